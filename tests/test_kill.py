# The long form, 5 to 12 minutes: python -m pytest -m long tests/test_kill.py
"""kill -9 at any moment loses nothing that was saved, and no run waits for a dead data worker."""
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data import dead_leaves, keyed_generator, write_shard

ROOT = Path(__file__).parent.parent
SMALLEST = ["--dim", "16", "--depth", "1", "--num_heads", "1", "--enc_dim", "8", "--resolution", "32",
            "--train_batch_size", "4", "--cache", "0", "--lr_decay", "0", "--log_every", "1",
            "--device", "cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


# ---------------------------------------------------------------- processes
class Run:
    """train.py in the background; what it has printed is in `text`."""
    def __init__(self, out, data, steps, *more, ranks=1):
        words = [*(TORCHRUN if ranks > 1 else []), "train.py", *SMALLEST, "--data", data, "--out", out,
                 "--max_train_steps", steps, *more]
        self.out, self.output, self.text = str(out), Path(out).with_suffix(".txt"), ""
        with open(self.output, "w") as file:
            self.process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=file,
                                            stderr=subprocess.STDOUT)

    def alive(self):
        """{process: its parent} of torchrun, ranks and data workers; they are known by the run folder."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):                                             # it has just ended
                if self.out.encode() in (path / "cmdline").read_bytes().split(b"\0"):
                    found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        return found

    def wait_for(self, pattern, seconds=240):
        """Until a line that it prints matches; AssertionError when it ends before."""
        until = time.monotonic() + seconds
        while True:
            over, self.text = self.process.poll() is not None, self.output.read_text()
            if re.search(pattern, self.text, re.M):
                return self
            assert not over and time.monotonic() < until, self.text[-3000:]
            time.sleep(0.005)

    def finish(self, codes=(0,), seconds=240):
        assert self.process.wait(seconds) in codes, self.output.read_text()[-3000:]
        self.text = self.output.read_text()
        return self

    def kill(self):
        """All its processes at once, as when the machine loses power."""
        while found := self.alive():
            for pid in sorted(found):                                           # torchrun first
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        self.process.wait(60)
        self.text = self.output.read_text()


@pytest.fixture
def start(monkeypatch):
    """Run, but in the end nothing of it is left, no processes and no files in /tmp."""
    runs = []

    def make(*words, **more):
        runs.append(Run(*words, **more))
        return runs[-1]

    with tempfile.TemporaryDirectory(prefix="kill", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield make
        for run in runs:
            run.kill()


# ---------------------------------------------------------------- what a run needs and leaves
def pictures(folder, kind):
    """10 pictures, among them one that is too small and one that cannot be read -> folder or tar."""
    members = []
    for n in range(10):
        picture = dead_leaves(keyed_generator("cpu", n), 24 if n == 3 else 40 + n)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "png")
        members.append((f"{n}.png", file.getvalue()[:300] if n == 6 else file.getvalue()))
    if kind == "tar":
        write_shard(folder / "pictures.tar", members)
        return folder / "pictures.tar"
    (folder / "pictures").mkdir()
    for name, content in members:
        (folder / "pictures" / name).write_bytes(content)
    return folder / "pictures"


def newest(out):
    """The checkpoint that OUT/last names: step, weights, averaged weights, optimizer; all of it must load."""
    folder = out / (out / "last").read_text().strip()
    state = torch.load(folder / "state.pt", weights_only=True)
    assert folder.name == f"step-{state['step']:08d}" and json.loads((folder / "args.json").read_text())
    moments = {f"{n} {k}": v for n, part in state["optimizer"]["state"].items() for k, v in part.items()}
    weights, averaged = (load_file(folder / file) for file in ("model.safetensors", "ema_model.safetensors"))
    return state["step"], weights, averaged, moments


def losses(out):
    """The log without what depends on the machine."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "waiting")}
            for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_end(a, b, steps):
    (done, *parts), (other, *others) = newest(a), newest(b)
    assert done == other == steps and len(losses(a)) == steps and losses(a) == losses(b)
    for part, twin in zip(parts, others, strict=True):
        assert part.keys() == twin.keys() and all(torch.equal(part[name], twin[name]) for name in part)


# ---------------------------------------------------------------- short
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, start):
    """Tar, one data worker, killed soon after step 4; the twin that is not killed runs at the same time."""
    data, more = pictures(tmp_path, "tar"), ("--num_workers", "1", "--save_every", "3")
    whole = start(tmp_path / "whole", data, 15, *more)
    killed = start(tmp_path / "killed", data, 15, *more).wait_for("^step 4 ")
    time.sleep(random.Random(0).uniform(0, 0.2))
    killed.kill()
    done = newest(tmp_path / "killed")[0]
    assert 3 <= done < 15
    (tmp_path / "killed" / ".half.step-00000001").mkdir()
    (tmp_path / "killed" / "previews" / ".half.1.00000003.png").touch()
    assert f", {done} of 15 steps" in start(tmp_path / "killed", data, 15, *more).finish().text
    assert not list((tmp_path / "killed").rglob(".*"))
    whole.finish()
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 15)


# ---------------------------------------------------------------- long
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_three_times_20_steps_are_60_steps(tmp_path, start, kind, ranks):
    """Two data workers per rank; killed after step 23 and after step 47."""
    data, more = pictures(tmp_path, kind), ("--num_workers", "2", "--save_every", "20")
    whole = start(tmp_path / "whole", data, 60, *more, ranks=ranks)
    for at, first in ((23, 0), (47, 20)):
        run = start(tmp_path / "parts", data, 60, *more, ranks=ranks).wait_for(f"^step {at} ")
        run.kill()
        assert f", {first} of 60 steps" in run.text and f"\nstep {first + 1} " in run.text
        assert run.text.count("\nstep 1 ") == (first == 0)                      # resumed, not restarted
    last = start(tmp_path / "parts", data, 60, *more, ranks=ranks).finish().text
    assert ", 40 of 60 steps" in last and re.search("^step (.*?) ", last, re.M)[1] == "41"
    whole.finish()
    assert_same_end(tmp_path / "whole", tmp_path / "parts", 60)


@pytest.mark.long
def test_20_kills_at_any_moment_lose_nothing(tmp_path, start):
    """A checkpoint every step. A third of the kills come from the start of the process on, a third while it
    trains, a third while it writes a checkpoint."""
    data, more = pictures(tmp_path, "tar"), ("--num_workers", "1", "--save_every", "1")
    out, done, halves, told, chance = tmp_path / "killed", 0, set(), [], random.Random(0)
    for turn in range(20):
        run = start(out, data, 1000, *more)
        if turn % 3 == 0:
            time.sleep(chance.uniform(0.5, 10))
        else:
            run.wait_for(f", {done} of 1000 steps$")                            # resumed, not restarted
            run.wait_for(f"^step {done + chance.randint(1, 2)} ")
        if turn % 3 == 1:
            time.sleep(chance.uniform(0, 0.5))
        while turn % 3 == 2 and not any(out.glob(".half.*")) and run.process.poll() is None:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
        run.kill()
        halves.update(out.glob(".half.*"))
        before, done = done, newest(out)[0] if (out / "last").exists() else 0
        told += [f"{before}-{done}", *(path.name for path in out.glob("**/.*"))]
        assert done >= before and f"\nstep {done + 2} " not in run.text, told
    assert len(halves) > 2 and done > 10, told
    for name in ("whole", "killed"):
        start(tmp_path / name, data, done + 3, *more).finish()
    assert_same_end(tmp_path / "whole", out, done + 3)
    assert len(list(out.glob("step-*"))) == 2 and not list(out.rglob(".*"))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dead_data_worker_ends_the_run_with_an_error(tmp_path, start, ranks):
    words = (tmp_path / "run", pictures(tmp_path, "tar"), 100_000, "--num_workers", "2", "--save_every", "5")
    run = start(*words, ranks=ranks).wait_for("^step 7 ")
    alive, begun = run.alive(), time.monotonic()
    below = [pid for pid, parent in alive.items() if parent in alive]           # ranks and workers
    workers = [pid for pid in below if ranks == 1 or alive[pid] in below]
    assert len(workers) == 2 * ranks
    os.kill(workers[-1], signal.SIGKILL)
    run.finish(codes=(1,), seconds=60)
    assert re.search(r"^error: DataLoader worker \(pid .*\) ", run.text, re.M), run.text[-2000:]
    assert ("Traceback" in run.text) == (ranks == 2) and newest(tmp_path / "run")[0] >= 5  # of torchrun
    while run.alive():                                                          # nobody stays behind
        assert time.monotonic() < begun + 60
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_to_all_processes_writes_a_checkpoint_first(tmp_path, start, ranks):
    """Batch systems send it to every process, torchrun to the ranks and their data workers."""
    data, more = pictures(tmp_path, "tar"), ("--num_workers", "2", "--save_every", "1000")
    run = start(tmp_path / "run", data, 100_000, *more, ranks=ranks).wait_for("^step 7 ")
    for pid in run.alive() if ranks == 1 else [run.process.pid]:
        os.kill(pid, signal.SIGTERM)
    run.finish(codes=(0,) if ranks == 1 else (1,))                              # 1: of torchrun itself
    assert "stopped by SIGTERM after step" in run.text, run.text[-2000:]
    assert newest(tmp_path / "run")[0] >= 7 and not run.alive()
