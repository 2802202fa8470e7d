"""The helpers in tools/, run as a user runs them."""
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import dead_leaves, keyed_generator, read_image, write_image
from model import TinyAutoencoder, load_vae
from sample import DEFAULTS, published_files
from tools.bench import STAGES, Watch, random_parts
from train import export

ROOT = Path(__file__).parent.parent


def run(tool, *words):
    return subprocess.run([sys.executable, ROOT / "tools" / tool, *map(str, words)], capture_output=True,
                          text=True)


def compare(*words):
    return run("compare.py", *words)


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
    done = run("bench.py", *words)
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


def test_roundtrip_scores_what_the_autoencoder_gives_back(tmp_path):
    """Two autoencoders in turn; the second one is half as wide in the decoder. Against plain calls."""
    torch.manual_seed(0)
    folders = [tmp_path / name for name in ("full", "light")]
    for folder, more in zip(folders, ({}, {"decoder_widths": [8, 12]}), strict=True):
        shape = {"widths": [16, 24]} | more
        export(folder, TinyAutoencoder(**shape).state_dict(), shape, "config.json")
    picture = dead_leaves(keyed_generator("cpu", 0), 70)[:, :45]                # 45 x 70: cut to 40 x 64
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "a.png", picture / 255)
    words = ["roundtrip.py", tmp_path / "photos", "--vaes", f"{folders[0]},{folders[1]}", "-o", tmp_path]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run(*words).stdout.splitlines()[3:]]
    hr, (full, light) = picture[None, :, :40, :64] / 127.5 - 1, map(load_vae, folders)
    for number, (row, vae) in enumerate(zip(rows, (full, light), strict=True), start=1):
        with torch.no_grad():
            back = (vae.decode(vae.encode(hr))[0] * 127.5 + 128).floor().clamp(0, 255)
        error = ((back - picture[:, :40, :64].float()) / 255).square().mean()
        assert abs(float(row[4]) + 10 * math.log10(error + 1e-8)) < 2e-3
        saved = Image.open(tmp_path / str(number) / "a.png")
        assert saved.size == (64, 40) and (read_image(saved.filename) * 255 - back).abs().max() <= 1
    assert [row[0] for row in rows] == [*map(str, folders)] and rows[0][7] == "1.00"
    assert float(rows[0][1]) > float(rows[1][1]) > 0


def test_roundtrip_explains_a_wrong_call_in_one_line(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for words, reason in (([], "photos is needed"), ([tmp_path, "--vaes", "x.pth"], "comes before it"),
                          ([tmp_path, "--vaes", tmp_path], "has no")):
        done = run("roundtrip.py", *words)
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1
