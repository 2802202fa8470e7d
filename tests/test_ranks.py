"""Several ranks compute what one does; a run goes on with another number of them, or at a larger size."""
import json
import math
import os
import re
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_train import SMALL

import model
import train
from config import cli, launch
from data import keyed_generator

ROOT = Path(__file__).parent.parent
STEPS, JOINED = 4, 8  # images of one optimizer step over all ranks and micro-batches
WAYS = ((1, False), (2, False), (2, True))  # micro-batches, in slices
CPU = torch.device("cpu")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- the step, in float64
def double_net(cfg):
    """Without its zeros at the start: every gradient counts from the first step on."""
    torch.manual_seed(0)
    net = model.DiT(cfg).double()
    for seed, p in enumerate(net.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=keyed_generator("cpu", seed), dtype=p.dtype)
    return net


def settings(folder, micros, shard):
    out = folder / f"{micros}-{shard}"
    return train.Config(dim=32, depth=2, num_heads=1, enc_dim=8, resolution=64, ae_type="sd2", out=str(out),
                        train_batch_size=JOINED // micros, gradient_accumulation_steps=micros, device="cpu",
                        max_train_steps=STEPS, save_every=STEPS, log_every=1, max_grad_norm=0.1, lr_decay=0,
                        ema_decay=0.9, weight_decay=0.5, shard=shard)


def samples():
    """Of all steps: z0, c_str, c_sem, t, noise, partial, alpha, strength, struct_noise."""
    n, like = STEPS * JOINED, dict(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z0, c_str, noise, struct_noise = torch.randn(4, n, 4, 8, 8, **like)
    t, alpha, strength = torch.rand(3, n, **like)
    partial = torch.arange(n) % 3 == 0
    return z0, c_str, torch.randn(n, 5, 8, **like), t, noise, partial, alpha, strength, struct_noise


class Recording(train.DistributedDataParallel):
    synced = ()  # per forward: whether its backward exchanges gradients

    def forward(self, *arguments):
        self.synced = (*self.synced, self.require_backward_grad_sync)
        Recording.last = self
        return super().forward(*arguments)


def train_on(rank, world, folder):
    """Rank of train.run, with and without accumulation and slices, on its share of the samples."""
    def share(cfg, prepare, start, rank, world, device):
        local = cfg.train_batch_size // world
        for first in range(rank * local, STEPS * JOINED, cfg.train_batch_size):
            yield tuple(part[first:first + local] for part in samples())

    def loss_fn(net, batch, generator, log):
        return train.flow_loss(net, *batch, log=log)

    train.batches, train.DistributedDataParallel = share, Recording
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    for way in WAYS:
        cfg = settings(folder, *way)
        dist.init_process_group("gloo", f"file://{cfg.out}-meet", rank=rank, world_size=world)
        train.run(cfg, net := double_net(cfg), loss_fn, None, lambda net: torch.zeros(1, 1, 3, 16, 16))
        if not cfg.shard:
            save_file(net.state_dict(), f"{cfg.out}/rank-{rank}.safetensors")
            Path(cfg.out, f"synced-{rank}").write_text(json.dumps(Recording.last.synced))


def plain_steps(cfg):
    """One process, the joined batch in one piece, norm, clipping and average written out."""
    net = double_net(cfg)
    ema, norms, losses = deepcopy(net), [], []
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.5)
    for first in range(0, STEPS * JOINED, JOINED):
        loss = train.flow_loss(net, *(part[first:first + JOINED] for part in samples()))
        opt.zero_grad()
        loss.backward()
        norm = sum(float(p.grad.square().sum()) for p in net.parameters()) ** 0.5
        for p in net.parameters():
            p.grad *= min(1.0, cfg.max_grad_norm / (norm + 1e-6))
        opt.step()
        for mean, now in zip(ema.parameters(), net.parameters(), strict=True):
            mean.data = cfg.ema_decay * mean.data + (1 - cfg.ema_decay) * now.data
        norms, losses = [*norms, norm], [*losses, loss.item()]
    return net, ema, norms, losses


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one_process_on_the_joined_batch(tmp_path):
    """Weights, EMA, loss and gradient norm agree to rounding, also with two micro-batches and in slices."""
    torch.multiprocessing.spawn(train_on, (2, tmp_path), nprocs=2)
    for micros, shard in WAYS:
        cfg = settings(tmp_path, micros, shard)
        net, ema, norms, losses = plain_steps(cfg)
        found, averaged = (load_file(Path(cfg.out, f"step-{STEPS:08d}", file))
                           for file in ("model.safetensors", "ema_model.safetensors"))
        for rank in () if shard else (0, 1):
            assert same(found, load_file(Path(cfg.out, f"rank-{rank}.safetensors")))
            synced = json.loads(Path(cfg.out, f"synced-{rank}").read_text())        # one exchange per step
            assert synced == ([True] if micros == 1 else [False, True]) * STEPS
        before = dict(double_net(cfg).named_parameters())
        for want, have in ((net, found), (ema, averaged)):
            for name, p in want.named_parameters():
                moved = (p - before[name]).abs().max()
                assert moved > 1e-4 and (p - have[name]).abs().max() < 1e-9 * moved, name
        rows = [json.loads(line) for line in Path(cfg.out, "log.jsonl").read_text().splitlines()]
        assert [row["grad"] for row in rows] == pytest.approx(norms, rel=1e-6) and min(norms) > 0.1
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6)


# ---------------------------------------------------------------- another number of ranks
ACCUMULATED = ["--resolution", "32", "--cache", "0", "--gradient_accumulation_steps", "2"]
SPY = """import os, torch, train, config
class Seen(train.Crops):
    def __getitem__(self, number):
        with open(os.environ["SEEN"] + os.environ.get("RANK", "0"), "a") as file:
            print(number, file=file)
        return super().__getitem__(number)
train.Crops, clip = Seen, torch.nn.utils.clip_grad_norm_
if os.environ.get("HOLD"):
    torch.nn.utils.clip_grad_norm_ = lambda parameters, most: clip(parameters, 1e-300)
config.launch(train.main)
"""


def spied(folder, ranks, steps, *more):
    """A run whose crops are written down -> its output, and the crop numbers of each rank."""
    (folder / "spy.py").write_text(SPY)
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] * (ranks > 1)
    words = [sys.executable, *torchrun, folder / "spy.py", *SMALL, *ACCUMULATED, "--out", folder / "out"]
    seen = folder / f"seen-{ranks}-{steps}-"
    done = subprocess.run([*words, "--max_train_steps", str(steps), *more], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "SEEN": str(seen)})
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = [[int(n) for n in Path(f"{seen}{rank}").read_text().split()] for rank in range(ranks)]
    assert all(crops[:4] == [0, 1, 2, 3] for crops in numbers)                  # of the preview
    return done.stdout, [crops[4:] for crops in numbers]


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, monkeypatch):
    """Two ranks, then one: from the saved weights and moments, with the next crops."""
    printed, crops = spied(tmp_path, 2, 3)
    assert crops == [[n for n in range(24) if n // 2 % 2 == rank] for rank in (0, 1)]
    assert "ranks before" not in printed
    monkeypatch.setenv("HOLD", "all gradients are 0")
    printed, (crops,) = spied(tmp_path, 1, 5, "--learning_rate", "0")
    assert ", 3 of 5 steps" in printed and crops == list(range(24, 40))
    (net, ema, moments), (net_after, ema_after, moments_after) = (
        (load_file(folder / "model.safetensors"), load_file(folder / "ema_model.safetensors"),
         torch.load(folder / "state.pt", weights_only=True)["optimizer"]["state"])
        for folder in (tmp_path / "out" / f"step-0000000{step}" for step in (3, 5)))
    assert same(net, net_after) and len(net) > 20
    for name, mean in ema.items():
        assert torch.allclose(ema_after[name], net[name] + 0.995**2 * (mean - net[name]), atol=1e-7), name
    for name, m in moments.items():
        after = moments_after[name]
        assert (m["step"], after["step"]) == (3, 5) and m["exp_avg_sq"].max() > 0
        assert torch.allclose(after["exp_avg"], 0.9**2 * m["exp_avg"], rtol=1e-5, atol=0), name
        assert torch.allclose(after["exp_avg_sq"], 0.95**2 * m["exp_avg_sq"], rtol=1e-5, atol=0), name
    assert len(re.findall("^2 ranks before.*(?:noise|random)", printed, re.M)) == 1


# ---------------------------------------------------------------- the next resolution
@pytest.fixture
def run_here(monkeypatch):
    """train.py without a new process."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        launch(train.main)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return run


def loss_of(net, batch, weights, native):
    """Eq. 1 of a network with these weights and the rotary positions of a grid of `native` tokens a side."""
    (z0, c_str, lr, drawn), net.native = batch, native
    rest = net.load_state_dict({n: v for n, v in weights.items() if "feat_rope" not in n}, strict=False)
    assert rest.missing_keys == ["feat_rope.freqs_cos", "feat_rope.freqs_sin"] and not rest.unexpected_keys
    return train.flow_loss(net, z0, c_str, net.semantic_encoder(lr), **drawn)


def test_the_next_stage_starts_from_the_average_of_the_last_one_at_a_larger_size(tmp_path, run_here):
    common = [*SMALL, "--cache", "0", "--depth", "2", "--ema_decay", "0.6", "--save_every", "100"]
    run_here(*common, "--resolution", "64", "--max_train_steps", "12", "--learning_rate", "4e-3",
             "--out", tmp_path / "small")
    last = model.model_folder(tmp_path / "small" / "last")
    small, raw = load_file(last / "ema_model.safetensors"), load_file(last / "model.safetensors")
    assert not torch.equal(small["x_embedder.proj.weight"], raw["x_embedder.proj.weight"])

    words = [*common, "--resolution", "128", "--init", str(tmp_path / "small" / "last"),
             "--out", str(tmp_path / "large"), "--max_train_steps", "1", "--learning_rate", "0"]
    run_here(*words)
    done = tmp_path / "large" / "step-00000001"
    for file in ("model.safetensors", "ema_model.safetensors"):                 # a rate of 0 moved nothing
        large = load_file(done / file)
        assert same(large, small | {n: v for n, v in large.items() if "feat_rope" in n})

    angles = [[place * 10_000 ** (-k / 8) for place in (row, col) for k in range(8)]      # 32 channels a head
              for row in range(8) for col in range(8)]
    cfg = cli(train.Config, train.PRESETS, words)
    net, vosr = model.DiT(cfg), train.frozen(cfg, CPU)
    for n, (name, f) in enumerate((("cos", math.cos), ("sin", math.sin))):
        table = torch.tensor([[f(a) for a in angle for _ in (0, 1)] for angle in angles])  # (64, 32)
        assert torch.allclose(large[f"feat_rope.freqs_{name}"], table, atol=1e-6)
        assert torch.allclose(model.rope_table(8, 8, net.native, 32, CPU)[n], table[:, ::2], atol=1e-6)
        assert small[f"feat_rope.freqs_{name}"].shape == (16, 32)

    def prepare(hr, lr):
        return *vosr.encode(torch.cat([hr, lr])).chunk(2), lr

    net.semantic_encoder = model.TinySemanticEncoder(cfg.enc_dim)
    untrained, batch = deepcopy(net.state_dict()), next(train.batches(cfg, prepare, 0, 0, 1, CPU))
    batch = *batch, train.draw(cfg, batch[0], keyed_generator("cpu", cfg.seed, 0, 0, 0))
    row = json.loads((tmp_path / "large" / "log.jsonl").read_text())
    fresh, squeezed, loss = (loss_of(net, batch, *how) for how in ((untrained, 8), (small, 4), (small, 8)))
    assert row["step"] == 1 and row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert 1e-5 < abs(loss / squeezed - 1) < 0.02     # positions of the 64 px stage, as sampled before
    assert loss < 0.95 * fresh                                                  # what was learned is there

    loss.backward()                                          # a fresh optimizer: moments of one gradient
    trained = [p for p in net.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
    assert row["grad"] == pytest.approx(norm.item(), rel=1e-5)
    state = torch.load(done / "state.pt", weights_only=True)
    for p, m in zip(trained, state["optimizer"]["state"].values(), strict=True):
        assert m["step"] == 1 and torch.allclose(m["exp_avg"], 0.1 * p.grad, rtol=1e-4, atol=1e-8)
