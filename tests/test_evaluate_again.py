"""A second call of evaluate.py does only what is missing; ranks share the pictures of one call."""
import os
import subprocess
import sys

import pytest
from PIL import Image
from test_evaluate import ROOT, call, pairs, rows  # noqa: F401  call and pairs are fixtures
from test_sample import weights  # noqa: F401  a fixture: folder of a random tiny family

import evaluate as ev


@pytest.fixture
def restored(monkeypatch):
    """Stems of the pictures that the model was run for."""
    stems, real = [], ev.restore
    monkeypatch.setattr(ev, "restore", lambda *words: (stems.append(words[-1]), real(*words))[1])
    return stems


def test_a_second_call_takes_what_is_finished(call, pairs, tmp_path, restored):  # noqa: F811
    first = call()
    table = rows(tmp_path / "out")
    assert call() == first and rows(tmp_path / "out") == table and restored == [*"abc"]
    assert call("--limit", 1)["count"] == 1 and restored == [*"abc"]
    restored.clear()
    (tmp_path / "out" / "SR" / "a.png").unlink()
    Image.open(pairs / "LR" / "b.png").rotate(180).save(pairs / "LR" / "b.png")
    again = call()
    assert restored == ["a", "b"] and again["lr_sha256"] != first["lr_sha256"]
    assert [old == new for old, new in zip(table, rows(tmp_path / "out"), strict=True)][2:] == [
        False, False, True, True]


@pytest.mark.parametrize("options", [("--seed", 1), ("--steps", 2), ("--color", "none"), ("--tile", 0)])
def test_other_settings_start_afresh(call, restored, options):  # noqa: F811
    call("--limit", 1)
    call("--limit", 1, *options)
    assert restored == ["a", "a"]


def test_other_code_starts_afresh(call, restored, tmp_path, monkeypatch):  # noqa: F811
    call("--limit", 1)
    (tmp_path / "evaluate.py").write_text("# of a user who has changed a metric")
    monkeypatch.setattr(ev, "__file__", str(tmp_path / "evaluate.py"))
    call("--limit", 1, "--metric_weights", ROOT / "assets")
    assert restored == ["a", "a"]


def test_an_interrupted_call_goes_on(call, tmp_path, restored, monkeypatch):  # noqa: F811
    def stop(*words, real=ev.restore):
        if words[-1] == "b":
            raise KeyboardInterrupt
        return real(*words)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ev, "restore", stop)
        call()
    assert restored == ["a"] and not list((tmp_path / "out").rglob(".half*"))
    summary = call()
    assert restored == [*"abc"] and summary["count"] == 3


def test_a_picture_of_from_that_changes_is_scored_again(call, pairs, tmp_path):  # noqa: F811
    scores = []
    for sign in (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_LEFT_RIGHT):
        (tmp_path / "done").mkdir(exist_ok=True)
        Image.open(pairs / "HR" / "a.png").transpose(sign).save(tmp_path / "done" / "a.png")
        scores.append(call("--from", tmp_path / "done")["means"][f"{tmp_path / 'done'}/"]["psnr_y"])
    assert scores[0] != scores[1]


@pytest.mark.slow
def test_two_ranks_write_the_table_of_one(call, pairs, tmp_path, request):  # noqa: F811
    call("--out", tmp_path / "one")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", ROOT / "evaluate.py",
               "--protocol", "pairs", "--data", pairs, "--out", tmp_path / "two", "--device", "cpu",
               "--weights", request.getfixturevalue("weights")]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("means of 3 pictures") == 1, done.stderr[-2000:]
    one, two = ([row | {"seconds": ""} for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert one == two
