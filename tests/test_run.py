"""The run around Eq. 1: ranks, resume, checkpoints, signals, full disks; every call is a process."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL

ROOT = Path(__file__).parent.parent


def start(out, steps, *more, ranks=1, code=0):
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    words = ["train.py", *SMALL, "--out", out, "--max_train_steps", steps, *more]
    done = subprocess.run([sys.executable, *(torchrun if ranks > 1 else []), *words], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def final(out):
    name = (out / "last").read_text().strip()
    return load_file(out / name / "model.safetensors"), load_file(out / name / "ema_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("cache", [pytest.param("0", marks=pytest.mark.long), "8"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, cache):
    start(tmp_path / "a", "6", "--cache", cache)
    start(tmp_path / "b", "3", "--cache", cache)
    assert "3 of 6 steps" in start(tmp_path / "b", "6", "--cache", cache).stdout
    for a, b in zip(final(tmp_path / "a"), final(tmp_path / "b"), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = ([{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "waiting")}
             for line in (tmp_path / out / "log.jsonl").read_text().splitlines()] for out in "ab")
    assert a == b and len(a) == 6


@pytest.mark.long
def test_torchrun_trains_on_two_ranks_and_leaves_a_complete_run_folder(tmp_path):
    start(tmp_path / "run", "3", "--cache", "0", ranks=2)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"args.json", "log.jsonl", "loss.png", "previews", "last", "step-00000003"} <= names
    assert {p.name for p in (tmp_path / "run" / "step-00000003").iterdir()} == {
        "model.safetensors", "ema_model.safetensors", "args.json", "state.pt"}
    assert not [n for n in names if n.startswith(".")]


@pytest.mark.slow
def test_init_starts_from_a_run_and_from_an_exported_family(tmp_path):
    start(tmp_path / "a", "3", "--cache", "8", "--export", tmp_path / "family")
    for source in (tmp_path / "a" / "last", tmp_path / "family" / "ms"):
        start(tmp_path / "b", "1", "--cache", "8", "--init", source, "--learning_rate", "0")
        a, b = final(tmp_path / "a")[1], final(tmp_path / "b")[0]
        assert all(torch.allclose(a[name], b[name], atol=2e-3) for name in a)
        shutil.rmtree(tmp_path / "b")


@pytest.mark.slow
def test_resuming_with_another_network_names_both_values(tmp_path):
    start(tmp_path / "run", "3", "--cache", "0")
    error = start(tmp_path / "run", "6", "--cache", "0", "--depth", "2", code=2).stderr
    assert "--depth 1" in error and "call 2" in error and error.count("\n") == 1


@pytest.mark.slow
def test_old_checkpoints_go_except_the_newest_and_the_milestones(tmp_path):
    start(tmp_path / "run", "8", "--cache", "8", "--save_every", "1", "--keep", "2", "--keep_every", "3",
          "--val_data", "procedural")
    kept = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert kept == [f"step-0000000{n}" for n in (3, 6, 7, 8)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(0.1 < row["val"] < 10 and 0 <= row["waiting"] <= 1 for row in rows)
    assert len({row["val"] for row in rows}) == 8 and "loss_t3" in {name for row in rows for name in row}


@pytest.mark.long
@pytest.mark.parametrize("sign, code", [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_goes_on_to_the_same_end(tmp_path, sign, code):
    """SIGTERM writes a checkpoint first; after SIGKILL the last one counts."""
    words = [sys.executable, "train.py", *SMALL, "--cache", "8", "--max_train_steps", "400", "--out"]
    for _ in range(1 + (sign == signal.SIGKILL)):
        run = subprocess.Popen([*words, str(tmp_path / "a")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        first = next(line for line in run.stdout if line.startswith("step "))
        steps = [line for _, line in zip(range(7), run.stdout, strict=False)]
        run.send_signal(sign)
        assert run.wait(60) == code and len(steps) == 7
        done = int((tmp_path / "a" / "last").read_text().strip()[5:])
        assert done >= int(first.split()[1]) - 1 and len(final(tmp_path / "a")) == 2
    steps = str(done + 5)
    for out in "ab":
        start(tmp_path / out, steps, "--cache", "8")
    for a, b in zip(final(tmp_path / "a"), final(tmp_path / "b"), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_a_loss_that_is_not_a_number_names_step_and_rank_and_spoils_nothing(tmp_path):
    """On the second of two ranks at step 5; what was saved at step 3 is finite."""
    code = ("import os, sys, torch, train, config\n"
            "def bad(*a, real=train.flow_loss, calls=[0], **k):\n    calls[0] += 1\n"
            "    return real(*a, **k) * (float('nan') if (os.environ['RANK'], calls[0]) == ('1', 5) else 1)\n"
            "train.flow_loss = bad\nconfig.launch(train.main)\n")
    (tmp_path / "bad.py").write_text(code)
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(tmp_path / "bad.py"),
             *SMALL, "--cache", "8", "--max_train_steps", "9", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "error: not finite: step 5, crops from 16, rank [1]; lower" in done.stderr
    assert (tmp_path / "run" / "last").read_text() == "step-00000003\n"
    assert all(value.isfinite().all() for part in final(tmp_path / "run") for value in part.values())


@pytest.mark.long
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path):
    start(tmp_path / "run", "3", "--cache", "8")
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("step-*/*")}
    for limit in (100_000, 300_000):
        words = [sys.executable, "train.py", *SMALL, "--cache", "8", "--max_train_steps", "6", "--out"]
        small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        done = subprocess.run([*words, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True,
                              preexec_fn=small)
        assert done.returncode == 2 and "step-00000006 cannot be written" in done.stderr
        assert {path: path.read_bytes() for path in (tmp_path / "run").glob("step-*/*")} == before


@pytest.mark.long
def test_torchrun_restarts_a_killed_rank_and_ends_at_the_same_weights(tmp_path):
    """The second of two ranks dies at step 5 of the first attempt; the second one goes on from step 3."""
    code = ("import os, signal, train, config\n"
            "def dies(*a, real=train.flow_loss, calls=[0], **k):\n    calls[0] += 1\n"
            "    now = os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT'], calls[0]\n"
            "    if now == ('1', '0', 5):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(*a, **k)\n"
            "train.flow_loss = dies\nconfig.launch(train.main)\n")
    (tmp_path / "dies.py").write_text(code)
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max-restarts=3",
             str(tmp_path / "dies.py"), *SMALL, "--cache", "8", "--max_train_steps", "7"]
    done = subprocess.run([sys.executable, *words, "--out", str(tmp_path / "a")], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and ", 3 of 7 steps" in done.stdout, done.stderr[-2000:]
    start(tmp_path / "b", "7", "--cache", "8", ranks=2)
    for a, b in zip(final(tmp_path / "a"), final(tmp_path / "b"), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
