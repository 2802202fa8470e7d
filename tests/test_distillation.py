"""tools/distillation.py: the plain step equals distill.py's, counts equal formulas, noise has its order."""
import sys
from dataclasses import replace

import pytest
import torch

import tools.distillation as tool
from config import launch
from distill import Config
from tools.distillation import BF16, FINE, LOSSES, METHODS, MIXED, MODES, OURS, counted, parts_of, unclipped

SHAPE = Config(dim=64, depth=1, num_heads=2, enc_dim=32, resolution=64, ae_type="sd2", dinov2_size=56,
               auxiliary_time_cond=True)


def small(**changes):
    """Networks, and inputs with far, near and equal times, and samples of both conditions."""
    nets, inputs = tool.random_pair(SHAPE, 64, tool.Config(batch=6, **changes), torch.device("cpu"))
    return nets, inputs | dict(t=torch.tensor([1.0, 0.9, 0.7, 0.5, 0.305, 0.3]),
                               r=torch.tensor([0.0, 0.2, 0.69, 0.1, 0.3, 0.3]),
                               partial=torch.tensor([False, True, False, False, True, False]))


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_step_has_the_loss_and_the_gradients_of_ours(method):
    found = []
    for name in (method, f"plain {method}"):
        (student, teacher), inputs = small()
        loss, parts = LOSSES[name](student.requires_grad_(True), teacher, **inputs)
        loss.backward()
        found.append({"loss": loss} | parts | {name: p.grad for name, p in student.named_parameters()})
    ours, plain = found
    assert {"loss", "u_pred", "v_guided", "blocks.0.attn.qkv.weight"} <= plain.keys() <= ours.keys()
    for name, value in plain.items():
        assert (ours[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, name
    if method == "rc":
        assert torch.equal(unclipped(ours).clamp(-1, 1), ours["corr"])


# ---------------------------------------------------------------- cost
def test_work_is_that_of_the_formulas():
    """Plain: 2 passes of the teacher, 2 of the student, 2 with gradients, which cost three forwards. Ours: a
    weak branch without cross-attention; semantics once per network, beside one empty token of each."""
    run, px = replace(SHAPE, depth=5), 64
    D, L, N, M, c = run.dim, run.depth, (px // 16) ** 2, (run.dinov2_size // 14) ** 2, 4
    width, project = int(2 / 3 * int(D * run.mlp_ratio)), 2 * (run.enc_dim * 3 * D + 3 * D * D)
    block = 12 * N * D**2 + 6 * N * D * width + 4 * M * D**2 + 4 * N * D * (N + M)
    embed, time = 2 * N * 8 * c * D, 2 * (256 * D + D**2)
    forward = L * block + M * project + embed + 2 * N * 4 * c * D + time + 16 * D**2
    semantic, empty = M * project + L * 4 * M * D**2, project + L * 4 * D**2
    weak = forward - M * project - L * (4 * N * D**2 + 4 * M * D**2 + 4 * N * M * D)
    student, no_gradient = forward + time, embed + 2 * 2 * 256 * D              # of z_t, c_str, t and r
    plain = 2 * forward + 8 * student - 2 * no_gradient
    ours = forward + weak + 2 * empty + 3 * semantic + 8 * (student - semantic) - 2 * no_gradient
    assert counted(run, px, "cpu") == {"forward": (1, forward), **dict.fromkeys(METHODS, (5, ours)),
                                       **dict.fromkeys(("plain rc", "plain shortcut"), (6, plain))}


@pytest.mark.slow
def test_meta_tensors_are_counted_like_real_ones():
    assert counted(SHAPE, 64) == counted(SHAPE, 64, "cpu")


def test_the_middle_half_is_printed_beside_the_median():
    assert tool.spread(torch.tensor([1.0, 2.0, 3.0, 4.0, 50.0])) == "3.00 (2.00 to 4.00)"


# ---------------------------------------------------------------- noise
def test_noise_falls_with_the_bits_of_a_product():
    """bf16 keeps 8 bits of a number, fp16 11, fp32 24."""
    found, exact = tool.noises(*small())
    assert list(found) == [*MODES, *MIXED] and exact.dtype == torch.float64 and len(exact) == 3
    noise = {mode: values[0] for mode, values in found.items()}
    assert noise["fp32"] < 1e-3 * noise[OURS] and 4 < noise[OURS] / noise[FINE] < 16
    assert noise["bf16, everything cast"] > noise[OURS] > 3 * noise[[*MIXED][1]]
    for whole, least, most, after, cosine in found.values():
        assert least <= whole <= most and after <= whole and 0.5 < cosine < 1.000001


def test_noise_goes_with_one_over_delta():
    noise = {}
    for delta in (0.01, 0.04):
        nets, inputs = small(delta=delta)
        corr = [unclipped(parts_of(nets, inputs, dtype))[:2] for dtype in (BF16, torch.float32)]
        noise[delta] = (corr[0] - corr[1]).std().item()
    assert 3 < noise[0.01] / noise[0.04] < 5


@pytest.mark.parametrize("way", ["", "ends", "all"])
def test_a_way_changes_the_layers_it_names(way):
    """With us the time, the first and the last layer are in float32, all else computes in half precision."""
    (nets, inputs), found = small(), {}
    for name, part in nets[0].named_modules():
        if name in ("x_embedder", "t_block", "final_layer", "blocks.0.mlp.w3"):
            part.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.dtype}))
    parts_of(nets, inputs, BF16, way)
    ends = BF16 if way else torch.float32
    assert found == {"x_embedder": ends, "blocks.0.mlp.w3": BF16, "final_layer": ends,
                     "t_block": BF16 if way == "all" else torch.float32}


# ---------------------------------------------------------------- the command
@pytest.mark.parametrize("word", ["noise", "cost"])
def test_its_tables_are_printed(word, monkeypatch, capsys):
    """noise really takes the bundled pair; counts and sizes are replaced by small ones."""
    pairs = {"0.5B": SHAPE, "1.4B": SHAPE, "tiny": tool.PAIRS["tiny"] if word == "noise" else SHAPE}
    monkeypatch.setattr(tool, "PAIRS", pairs)
    monkeypatch.setattr(tool, "MODES", {mode: MODES[mode] for mode in (OURS, FINE)})
    monkeypatch.setattr(tool, "counted", lambda *_: dict.fromkeys(["forward", *LOSSES], (5, 1e12)))
    monkeypatch.setattr(sys, "argv", ["x", word, "--batch", "2", "--rounds", "2", "--depth", "1"])
    tool.main()
    tables = capsys.readouterr().out.split("\n\n")[word == "cost":: 2]
    rows = {"noise": [2 * (2 + len(MIXED) + 1)], "cost": [4, 2]}[word]
    assert [len(table.splitlines()) - 2 for table in tables] == rows
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("words", [[], ["both"], ["noise", "cost"], ["cost", "--rounds", "0"]])
def test_a_wrong_call_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", *words])
    with pytest.raises(SystemExit) as stop:
        launch(tool.main)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
