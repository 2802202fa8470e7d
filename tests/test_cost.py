"""tools/cost.py: its counts against paper, known numbers and what PyTorch holds; its tables."""
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import model
import tools.cost as tool
import train
from config import launch
from model import DiT
from tools.cost import RECIPES, Live, by_blocks, flops, held, memory, micro_batch, sharded, step_of, work

SMALL = train.Config(dim=64, depth=3, num_heads=2, enc_dim=32, resolution=128, ae_type="tiny")
BLOCK = 8_896_512  # FLOPs of a block of it, see below


def size(*nets):
    return sum(p.numel() for net in nets for p in net.parameters())


def forward(cfg):
    """A forward pass of one image, on meta tensors, as a function."""
    net, side = DiT(cfg), cfg.resolution // 8
    z, t, tokens = torch.empty(1, net.channels, side, side), torch.empty(1), cfg.dinov2_size // 14
    tokens = cfg.resolution // 32 if cfg.ae_type == "tiny" else tokens
    return lambda: net(z, t, z, torch.empty(1, tokens**2, cfg.enc_dim))


# ---------------------------------------------------------------- work
def test_a_linear_layer_an_attention_and_a_convolution_count_as_on_paper():
    with torch.device("meta"):
        x, q, k = torch.empty(5, 7), torch.empty(1, 2, 5, 8), torch.empty(1, 2, 3, 8)
        linear, image = torch.nn.Linear(7, 11), torch.empty(1, 3, 8, 8)
        assert flops(lambda: linear(x)) == 2 * 5 * 7 * 11
        assert flops(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * 2 * (2 * 5 * 3 * 8)
        assert flops(lambda: model.conv3(3, 4)(image)) == 2 * 64 * 3 * 4 * 9


def test_a_block_counts_as_on_paper():
    """D 64, 64 image tokens, 16 semantic tokens, SwiGLU width int(2/3 * 256) = 170."""
    self_attention = 2 * 64 * 64 * (3 * 64 + 64) + 2 * (2 * 64 * 64 * 64)       # qkv and proj; q k^T and p v
    cross = 2 * 64 * 64 * (64 + 64) + 2 * 16 * 64 * (64 + 64) + 2 * (2 * 64 * 16 * 64)      # q, proj; k, v
    assert self_attention + cross + 2 * 64 * 64 * (2 * 170) + 2 * 64 * 170 * 64 == BLOCK
    with torch.device("meta"):
        two, three = (flops(forward(replace(SMALL, depth=depth))) for depth in (2, 3))
    assert three - two == BLOCK


def test_the_work_of_a_small_recipe_is_as_on_paper():
    """Backward is twice forward, but for what needs no gradient: latents, semantic tokens, times."""
    done, D = work(SMALL), 64
    tokens, patches = 2 * 16 * (32 * 3 * D + 3 * D * D), 2 * 64 * (8 + 4) * 16 * D
    around = tokens + patches + 2 * (256 * D + D * D) + 12 * D * D + 4 * D * D
    assert done["ours"][0] == done["official"][0] == pytest.approx(3 * (3 * BLOCK + around), rel=0.02)
    quarter, eighth = 9 * (48 * 64 + 4 * 64 * 64), 256 * 96 + 9 * (2 * 96 * 96 + 96 * 16)
    assert done["ours"][1] == 2 * 2 * (32 * 32 * quarter + 16 * 16 * eighth)    # of HR and LR
    assert done["official"][1] == 2 * done["ours"][1]
    assert done["parameters"] == size(DiT(SMALL)) and done["around"] == size(DiT(replace(SMALL, depth=2)))
    assert done["frozen"] == size(*tool.frozen(SMALL))


def test_by_blocks_is_exact_for_what_grows_with_the_depth():
    assert by_blocks(replace(SMALL, depth=28), lambda cfg: [5 + 7 * cfg.depth, 3]) == [5 + 7 * 28, 3]


# Performance contract 1.1 and 1.2: GF of a forward, an encode, tokens up to the used block and of all blocks,
# millions of parameters; 5.2: ms of official and minimum on an A100.
KNOWN = {"0.5B-512": (1213.9, 1117, 160.6, 213.8, 485.623616, 26.7, 19.3),
         "1.4B-512": (3271.8, 636, 543.0, 723.6, 1393.943616, 41.9, 37.3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_counts_are_those_of_the_performance_contract(name):
    (once, encode, tokens, every, millions, *ms), done = KNOWN[name], work(RECIPES[name])
    assert [n / 1e9 for n in done["ours"]] == pytest.approx([3 * once, 2 * encode, tokens], rel=0.005)
    assert [n / 1e9 for n in done["official"]] == pytest.approx([3 * once, 4 * encode, every], rel=0.005)
    assert done["parameters"] == round(1e6 * millions)
    assert [sum(done[whose]) / 312e9 for whose in ("official", "ours")] == pytest.approx(ms, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("size, terms, millions", [("0.5B", (14.59, 13.50), 486.936384),
                                                   ("1.4B", (34.71, 31.72), 1396.6992)])
def test_a_distillation_step_is_ten_forwards_or_what_sharing_leaves_of_them(size, terms, millions):
    """Performance contract 1.2 and 1.1: TF official and minimum, the student has the embedder of r."""
    done, plain = work(RECIPES[f"{size} distillation"]), work(RECIPES[f"{size}-512"])
    official = done["official"][0] + done["official"][1] / 2 + done["official"][2]
    assert [official / 1e12, sum(done["ours"]) / 1e12] == pytest.approx(terms, abs=0.011)
    assert done["official"][0] == pytest.approx(10 / 3 * plain["ours"][0], rel=0.001)
    assert done["parameters"] == round(1e6 * millions)
    assert done["frozen"] == plain["frozen"] + plain["parameters"]


def test_the_recipes_are_those_of_table_5():
    images = {name: row.max_train_steps * row.train_batch_size for name, row in RECIPES.items()}
    assert images == {"0.5B": 400_000 * 1024, "0.5B-512": 400_000 * 256, "1.4B": 400_000 * 1024,
                      "1.4B-512": 400_000 * 256, "0.5B distillation": 50_000 * 32,
                      "1.4B distillation": 50_000 * 32}


# ---------------------------------------------------------------- memory
def test_live_memory_is_what_is_alive_and_views_cost_nothing():
    with FakeTensorMode(), Live() as live:
        x = torch.empty(1000)                                           # 4000 bytes
        y = x.view(10, 100)[2:]
        x = torch.empty(500)                                            # y keeps the first
        assert live.peak == 6000 and len(y) == 8
        del y
        x = torch.empty(250)                                            # 2000 + 1000 while it is replaced
        assert live.peak == 6000 and sum(s.nbytes() for s in live.live) == x.nbytes == 1000


@pytest.mark.parametrize("norm", [torch.nn.GroupNorm(1, 4), torch.nn.LayerNorm(8), model.ChannelNorm(4)])
def test_norms_take_the_memory_of_float32_as_on_a_gpu(norm):
    """A cast copy of x and the result, 4 bytes each, stand beside x in half precision; little else does."""
    def run():
        x = torch.empty(1, 4, 1000, 8, dtype=torch.bfloat16)
        assert norm.requires_grad_(False)(x).dtype == torch.float32
    before = F.group_norm, F.layer_norm, F.normalize
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert 0 <= held(run) - 32_000 * (2 + 4 + 4) <= 32_000
    assert before == (F.group_norm, F.layer_norm, F.normalize)


def test_the_memory_of_encodes_is_as_on_paper_and_recomputing_takes_less(monkeypatch):
    """Of two pictures at the first convolution: they, unshuffled, that in bf16, 64 channels of 32 x 32."""
    monkeypatch.setattr(tool, "by_blocks", lambda cfg, count: count(replace(cfg, depth=1)))
    model.rope_table.cache_clear()                                      # of other tests
    (plain, recomputed, encodes), pictures = memory(SMALL), 2 * 3 * 128 * 128
    assert encodes == pictures * (4 + 4 + 2) + 2 * 32 * 32 * 64 * 2
    assert 64 * 64 * 4 < recomputed < plain
    net, z = DiT(SMALL), torch.zeros(1, 16, 16, 16)                     # no fake tables are left behind
    assert net(z, torch.ones(1), z, torch.zeros(1, 16, 32)).abs().sum() == 0    # v = 0 at the beginning


@pytest.mark.slow
def test_recomputing_keeps_the_input_of_each_block_instead_of_its_activations():
    """Of a million blocks, so that all else is nothing: float32 tokens, N x D x 4 bytes per image, block."""
    plain, recomputed, _ = memory(replace(SMALL, depth=10**6))
    assert recomputed / 10**6 == pytest.approx(64 * 64 * 4, rel=0.01) and plain > 10 * recomputed


def test_state_is_weight_gradient_bucket_moments_and_average_and_is_what_training_holds():
    net = DiT(replace(SMALL, depth=1))
    opt = torch.optim.AdamW(net.parameters())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    moments = [x for state in opt.state.values() for x in state.values() if x.dim()]
    there = [*net.parameters(), *(p.grad for p in net.parameters()), *moments]
    assert sum(x.numel() * x.element_size() for x in there) + 2 * 4 * size(net) == tool.STATE * size(net)
    assert sharded(dict(parameters=800, around=10), 8) == 20 * 100 + 40


def test_the_state_in_slices_is_what_fsdp_holds():
    """One of 8 ranks, whose messages go nowhere: slices of the weights (gradients, moments, average come on
    top), what is whole, and bf16 copies of all weights, which autocast keeps to the end of a forward pass."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    cfg = replace(SMALL, dim=256, num_heads=4, depth=6, resolution=32)
    dist.init_process_group("fake", rank=0, world_size=8, store=fake.FakeStore())
    try:
        number, around = (size(DiT(c)) for c in (cfg, replace(cfg, depth=2)))
        with Live() as live:
            net, _, loss = step_of(cfg, 1)
            for part in (*net.blocks, root := train.Within([net])):
                fully_shard(part, mesh=init_device_mesh("cpu", (8,)), reshard_after_forward=True)
            live.peak, net.recompute = 0, True
            with torch.autocast("cpu", torch.bfloat16):
                out = root(lambda net: loss())
            out.backward()
    finally:
        dist.destroy_process_group()
    slices = sharded(dict(parameters=number, around=around), 8) - 16 * number / 8
    assert live.peak == pytest.approx(slices + 2 * number, rel=0.05)


def test_the_largest_micro_batch_is_what_is_left_over_the_need_of_an_image():
    done = dict(parameters=10**9, frozen=10**9)                         # 4 GB frozen, bf16 copies 2 GB
    assert micro_batch(40, done, 24e9, 3 * 10**9, 10**9) == 3           # (40 - 30) / 3
    assert micro_batch(40, done, 24e9, 10**9, 4 * 10**9) == 3           # the encodes: (40 - 28) / 4
    assert micro_batch(24, done, 24e9, 10**9, 10**9) == 0


# ---------------------------------------------------------------- the commands
def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["cost.py", *words])
    launch(tool.main)
    return capsys.readouterr().out


def tables(out):
    """Every table of the output as rows of cells."""
    blocks = [block.splitlines() for block in out.strip().split("\n\n") if block.startswith("|")]
    return [[line.strip("|").strip().split(" | ") for line in block if "---" not in line] for block in blocks]


def test_the_tables_are_as_on_paper(monkeypatch, capsys):
    """An image takes 3 and 6 seconds of an A100; 864 thousand of them at 20 % of 16 cards 9.375 days."""
    done = dict(ours=[312e12] * 3, official=[624e12] * 3, parameters=10**9, around=10**8, frozen=5 * 10**8)
    monkeypatch.setattr(tool, "RECIPES", dict.fromkeys(("small", "student"), replace(
        SMALL, max_train_steps=1000, train_batch_size=864)))
    monkeypatch.setattr(tool, "work", lambda cfg: done)
    monkeypatch.setattr(tool, "memory", lambda cfg: (4 * 10**9, 10**9, 2 * 10**9))
    out = run(monkeypatch, capsys, "--mfu", "0.2,0.1", "--gpus", "16")
    assert all([row[0] for row in rows] == ["recipe", "small", "student"] for rows in tables(out))
    (_, each, _), (head, days, _), (_, gb, _) = tables(out)
    parts = ["1000.0 M", "500.0 M", "312.000 + 312.000 + 312.000 = 936.000"]
    assert each[2:] == [*parts, *(" + ".join(3 * [f"{n}000.0"]) + f" = {3 * n}000.0" for n in (2, 1)), "2.00"]
    assert days[1:] == ["0.9 M", "9.4", "19", "3", "5.9"] and head[2] == "A100, assumed 20%"
    # 24 GB of state or 20 / 16 + 0.4; 2 frozen, 2 of bf16, 2 lost; 4 or 1 in a step, 2 in the encodes
    assert gb[1:] == ["24.00 / 1.65", "2.00", "2.00", "4.00 / 1.00", "2.00", "- / - / 9", "2 / 6 / 17",
                      "12 / 26 / 37", "27 / 56 / 67"]
    assert "16 GPUs: counted" in out and "--shard on 16 GPUs" in out and "measured" not in out


@pytest.mark.slow
def test_measure_trains_and_prints_every_stage(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "measure", "--steps=2", "--batch=2", "--device=cpu", "--peak=0.5")
    (head, *lines), = tables(out)
    rows = {line[0]: line[1:] for line in lines}
    assert [*rows] == [*tool.STAGES, "dit", "step"] and head[1] == "ms, measured"
    ms = {stage: float(row[0]) for stage, row in rows.items()}
    assert sum(ms[stage] for stage in tool.STAGES) == pytest.approx(ms["step"], abs=0.5)
    assert ms["dit"] == pytest.approx(ms["forward"] + ms["backward"], abs=0.2) and min(ms.values()) > 0
    tera, speed, share = (float(cell.strip("%")) for cell in rows["dit"][3:])
    counted = work(train.Config(**train.PRESETS["tiny"]))["ours"]
    assert tera == pytest.approx(2e-12 * counted[0], rel=1e-3)
    assert float(rows["step"][3]) == pytest.approx(2e-12 * sum(counted), rel=1e-3)
    assert speed == pytest.approx(1e3 * tera / ms["dit"], rel=0.01)
    assert share == pytest.approx(100 * speed / 0.5, abs=0.1)
    assert float(out.split("measured: ")[1].split()[0]) == pytest.approx(2e3 / ms["step"], rel=0.01)


@pytest.mark.parametrize("words, reason", [
    (["measured"], "the only word is measure"), (["--gpus=0"], "positive"), (["--mfu=0,1"], "positive"),
    (["measure", "--preset=2B"], "unknown preset"),
    (["measure", "--preset=0.5B", "--device=cpu"], "measured on a CUDA device, not on cpu")])
def test_a_wrong_call_is_explained_in_one_line(words, reason, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, *words)
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
