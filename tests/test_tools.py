"""The helpers in tools/, run as a user runs them."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sample import DEFAULTS, published_files
from tools.bench import STAGES, Watch, random_parts

ROOT = Path(__file__).parent.parent


def compare(*words):
    return subprocess.run([sys.executable, ROOT / "tools" / "compare.py", *map(str, words)],
                          capture_output=True, text=True)


def test_compare_enlarges_the_smaller_picture_and_writes_strip_and_page(tmp_path):
    Image.new("RGB", (10, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (40, 32), "blue").save(tmp_path / "b.png")
    done = compare(tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    strip = Image.open(tmp_path / "both.png").convert("RGB")
    assert strip.size == (84, 56)
    assert strip.getpixel((20, 16)) == (255, 0, 0) and strip.getpixel((60, 16)) == (0, 0, 255)
    page = (tmp_path / "both.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page


def test_compare_explains_a_wrong_call_in_one_line(tmp_path):
    for words in (["one.png"], ["missing.png", "other.png"]):
        done = compare(*words)
        assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_bench_prints_seconds_and_memory_of_every_stage():
    words = ["--sizes", "64,128", "--tiles", "64", "--repeat", "1"]
    command = [sys.executable, ROOT / "tools" / "bench.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny-os")]
    assert [row[1] for row in rows] == ["64", "128"]
    for row in rows:
        cells = [tuple(map(float, cell.split(" / "))) for cell in row[4:4 + len(STAGES)]]
        assert all(seconds >= 0 and mib > 20 for seconds, mib in cells) and cells[0][0] > 0
        total = float(re.match("[0-9.]+", row[-2])[0])
        assert abs(sum(seconds for seconds, _ in cells[1:]) - total) < 0.05


def test_bench_counts_every_moment_in_one_stage():
    watch = Watch("meta")
    with watch.stage("encode"), watch.stage("decode"):
        pass
    assert watch.now == "rest" and set(watch.seconds) == set(STAGES)
    assert watch.seconds["encode"] > 0 and watch.seconds["decode"] > 0


@pytest.mark.parametrize("name", [name for name, row in DEFAULTS.items() if row["ae_type"] != "tiny"])
def test_random_weights_are_laid_out_like_the_published_ones(name, tmp_path):
    parts = random_parts(name)
    assert tuple(parts) == published_files(name)
    parts[published_files(name)[0]](tmp_path / "args.json")
    assert ('"onestep"' in (tmp_path / "args.json").read_text()) == (name == "2.0")
