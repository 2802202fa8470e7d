"""Switches of the training that change what is learned or where it lies: guidance, semantics, slices."""
import json
import signal
import sys

import numpy as np
import pytest
import torch
from test_run import final, start
from test_sample import picture
from test_train import SMALL

import distill
import model
import sample
import train
from config import cli, launch
from data import keyed_generator


def run_here(script, out, steps, *more):
    """A run in this process: half a dozen starts of Python less."""
    words = [*SMALL, "--out", out, "--max_train_steps", steps, *more]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in (script.__file__, *words)])
        launch(script.main)
    signal.signal(signal.SIGTERM, before)


def settings(*words):
    cfg = cli(train.Config, train.PRESETS, [*SMALL, *words])
    train.check(cfg)
    return cfg


@pytest.mark.parametrize("guidance, alphas, share", [("partial", (0.05, 0.25), 0.1), ("uncond", (0, 0), 0.1),
                                                     ("full", (0.05, 0.25), 0)])
def test_the_guidance_of_table_7_decides_what_the_auxiliary_samples_see(guidance, alphas, share):
    cfg = settings("--guidance", guidance)
    drawn = train.draw(cfg, torch.zeros(2000, 1, 1, 1), keyed_generator("cpu", 1))
    assert alphas[0] <= drawn["alpha"].min() and drawn["alpha"].max() <= alphas[1]
    assert abs(drawn["partial"].float().mean() - share) < 0.03 * (share > 0) + 1e-9


def test_a_wrong_guidance_names_the_three(capsys):
    with pytest.raises(SystemExit):
        settings("--guidance", "none")
    assert "--guidance is one of partial, uncond, full, got 'none'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_without_semantics_trains_is_distilled_and_samples(tmp_path):
    """Nothing about a semantic encoder is needed, written or used."""
    family = tmp_path / "weights" / "tiny"
    (family / "vae").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (family / "vae" / name).write_bytes((train.Path("weights/tiny/vae") / name).read_bytes())
    words = ("--cache", "8", "--semantics", "false", "--weights", tmp_path / "weights", "--export", family)
    run_here(train, tmp_path / "run", 2, *words)
    assert not (family / "semantic").exists()
    assert not [name for name in final(tmp_path / "run")[1] if name.startswith(model.BESIDE)]
    run_here(distill, tmp_path / "student", 2, *words, "--method", "rc")
    for name in ("tiny-ms", "tiny-os", str(tmp_path / "run")):
        vosr = sample.load(name, 25, tmp_path / "weights")
        assert not vosr.semantic_tokens(torch.ones(2, 3, 64, 64)).any()
        sample.upscale(picture(16, 16), vosr, steps=2)
    with pytest.raises(SystemExit):                                         # the teacher has none
        run_here(distill, tmp_path / "x", 2, *words, "--semantics", "true", "--weights", "weights")


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["uncond", "full"])
def test_a_run_is_sampled_with_the_guidance_it_was_trained_for(tmp_path, guidance):
    run_here(train, tmp_path / "run", 2, "--cache", "8", "--guidance", guidance)
    vosr = sample.load(str(tmp_path / "run"), 25)
    torch.nn.init.normal_(vosr.dit.final_layer.linear.weight, std=0.02)     # it starts at zero

    def run(**options):
        return np.asarray(sample.upscale(picture(16, 16), vosr, steps=2, **options)).tolist()

    if guidance == "full":
        assert vosr.defaults["cfg_scale"] == 1 and run() == run(cfg_scale=1.0) == run(alpha=0.3)
    else:
        assert run(cfg_scale=0.5) == run(cfg_scale=0.5, alpha=0.3) != run(cfg_scale=1.0)


@pytest.mark.slow
def test_slices_over_two_ranks_train_as_one_piece_and_each_resumes_the_other(tmp_path):
    """--shard computes what DDP computes, to rounding; its checkpoints hold whole tensors."""
    more = ("--cache", "8", "--val_data", "procedural", "--depth", "2")
    start(tmp_path / "ddp", "6", *more, ranks=2)
    for steps, switch in (("2", []), ("4", ["--shard"]), ("6", [])):
        start(tmp_path / "shard", steps, *more, *switch, ranks=2)
    rows = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
            for name in ("ddp", "shard")]
    assert all(abs(rows[0][key] - rows[1][key]) < 1e-4 for key in ("loss", "grad", "val"))
    for a, b in zip(final(tmp_path / "ddp"), final(tmp_path / "shard"), strict=True):
        assert a.keys() == b.keys() and all(a[n].shape == b[n].shape for n in a)
        assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)
    a, b = (torch.load(tmp_path / name / "step-00000006" / "state.pt") for name in ("ddp", "shard"))
    a, b = (part["optimizer"]["state"] for part in (a, b))
    assert a.keys() == b.keys() and a
    for key in a:
        assert torch.allclose(a[key]["exp_avg_sq"], b[key]["exp_avg_sq"], rtol=1e-3, atol=1e-12)


def test_slices_need_ranks(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here(train, tmp_path, 1, "--shard")
    assert "--shard divides over the ranks of torchrun" in capsys.readouterr().err
