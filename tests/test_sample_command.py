"""The command line of sample.py: what it writes, skips and refuses, with the random model of test_sample."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_sample
from PIL import Image
from test_sample import picture

import sample
from config import launch
from sample import upscale

ROOT = Path(__file__).parent.parent
weights, student = test_sample.weights, test_sample.student  # fixtures


@pytest.fixture
def command(weights, tmp_path, monkeypatch, capsys):
    """Runs `python sample.py ...` in tmp_path and in this process; gives exit code, stdout, stderr."""
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--weights={weights}", "--device=cpu", *arguments])
        try:
            code = launch(sample.main) or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


def test_folder_with_a_bad_file(weights, tmp_path):
    """In a process of its own: sub-folders, odd names, hidden files; good pictures are finished, exit 1."""
    (tmp_path / "photos/sub").mkdir(parents=True)
    picture(8, 6).save(tmp_path / "photos/a.png")
    picture(8, 6).save(tmp_path / "photos/sub/ü b.JPG")
    for name in ("bad.png", "notes.json", "._a.png"):
        (tmp_path / "photos" / name).write_text("no picture")
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--weights", weights, "photos", "-o", "out"],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: 1 of 3 failed: {Path('photos/bad.png')}"
    results = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert results == ["a_x4.png", "sub/ü b_x4.png"]
    assert all(part in done.stdout for part in ("8x6 -> 32x24", "1 step ", " s ", "a_x4.png"))


def test_finished_outputs_are_skipped(command, tmp_path):
    """Beside the inputs, too, where earlier results are not inputs; a file of 0 bytes is not finished."""
    for name in "ab":
        picture(8, 6).save(tmp_path / f"{name}.png")
    assert command(".")[0] == 0
    (tmp_path / "a_x4.png").write_bytes(b"")
    kept = (tmp_path / "b_x4.png").stat().st_mtime_ns
    code, out, _ = command(".")
    assert code == 0 and "1 of 2 outputs exist" in out
    assert Image.open(tmp_path / "a_x4.png").size == (32, 24)
    assert (tmp_path / "b_x4.png").stat().st_mtime_ns == kept
    assert command("--overwrite", ".")[0] == 0 and (tmp_path / "b_x4.png").stat().st_mtime_ns > kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a_x4.png", "b.png", "b_x4.png"]


def test_command_line_equals_the_library(command, student, tmp_path):
    picture(9, 7).save(tmp_path / "-a.png")
    assert command("--scale", "2.5", "--fidelity=0.5", "--seed", "3", "--", "-a.png")[0] == 0
    expected = upscale(picture(9, 7), student, 2.5, name="-a.png", fidelity=0.5, seed=3)
    assert np.array_equal(Image.open(tmp_path / "-a_x2.5.png"), expected)
    assert command("--long", "100", "--", "-a.png")[0] == 0
    assert Image.open(tmp_path / "-a_long100.png").size == (100, 78)


WRONG = """missing.png: missing.png does not exist
text.png: text.png is not an image
empty.png: empty.png is not an image
--stesp 1 a.png: did you mean --steps
--steps many a.png: --steps wants int
--fidelity 2 a.png: --fidelity lies between 0 and 1
--color blue a.png: --color is one of wavelet, adain, none
--size 100 a.png: --size wants WIDTHxHEIGHT
--model nix a.png: unknown model 'nix'
--long 4 a.png: would shrink it
-o out.png a.png: --out wants a folder
a.png a.jpg: would both become
--overwrite a.png a_x4.png: a_x4.png is an input and would be overwritten
nothing: nothing holds no pictures
: no input"""


@pytest.mark.parametrize("arguments, words", [line.split(": ") for line in WRONG.splitlines()])
def test_wrong_call_ends_with_one_line(command, tmp_path, arguments, words):
    for name in {"a.png", *(a for a in arguments.split() if a.startswith("a"))}:
        picture(8, 6).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    code, _, err = command(*arguments.split())
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("error: ")
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
