"""Metrics on pictures whose scores are known, and the protocols on small pairs."""
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import weights  # noqa: F401  a fixture: folder of a random tiny family

import evaluate as ev
from config import cli
from sample import load, upscale

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"
PUBLISHED = SHARED / "realsr" / "published"
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason="pictures are not in the repository")


def pair(h, w):
    """A reference and a disturbed copy, uint8 (h, w, 3); RandomState, because its stream is frozen."""
    y, x = np.mgrid[:h, :w]
    ref = np.stack([128 + 60 * np.sin(2 * np.pi * x / 17 + c) + 40 * np.cos(2 * np.pi * y / 11 - c / 2)
                    for c in range(3)], -1)
    noise = np.random.RandomState(0).randint(-20, 21, (h, w, 3))
    ref = np.clip(np.round(ref + noise), 0, 255).astype(np.uint8)
    r = ref.astype(int)
    sr = (r + np.roll(r, 1, axis=1)) // 2 + np.random.RandomState(1).randint(-12, 13, (h, w, 3))
    return ref, np.clip(sr, 0, 255).astype(np.uint8)


def resized(image, width, height):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------- metrics, numbers of pyiqa 0.1.15
@pytest.mark.parametrize("size, psnr, psnr_full, rgb, ssim, ssim_full, gmsd, psnr_cut, ssim_cut", [
    ((64, 48), 28.7775, 27.4556, 25.1449, 0.954753, 0.9539, 0.018636, 29.4477, 0.952965),
    ((193, 256), 29.6297, 28.3078, 25.5264, 0.953459, 0.95245, 0.02480, 29.6273, 0.953400)])
def test_metrics_with_a_reference_give_the_toolbox_numbers(
        size, psnr, psnr_full, rgb, ssim, ssim_full, gmsd, psnr_cut, ssim_cut):
    ref, sr = pair(*size)
    cut = [x[4:-4, 4:-4] for x in (sr, ref)]
    found = ev.psnr_y(sr, ref), ev.psnr_y(sr, ref, False), ev.psnr_rgb(sr, ref), ev.psnr_y(*cut)
    assert found == pytest.approx((psnr, psnr_full, rgb, psnr_cut), abs=1e-3)
    found = ev.ssim_y(sr, ref), ev.ssim_y(sr, ref, False), ev.gmsd_y(sr, ref), ev.ssim_y(*cut)
    assert found == pytest.approx((ssim, ssim_full, gmsd, ssim_cut), abs=2e-5)


def test_ms_ssim_with_odd_sides_gives_the_toolbox_numbers():
    ref, sr = pair(193, 256)
    found = ev.ms_ssim_y(sr, ref), ev.ms_ssim_y(sr, ref, False)
    assert found == pytest.approx((0.98450, 0.98421), abs=2e-5)


def test_a_picture_compared_with_itself_is_perfect():
    ref, _ = pair(193, 256)
    assert ev.psnr_y(ref, ref) == ev.psnr_rgb(ref, ref) == ev.lr_psnr(ref, ref) == 80
    assert ev.ssim_y(ref, ref) == ev.ms_ssim_y(ref, ref) == 1
    assert ev.gmsd_y(ref, ref) == ev.spec_lo(ref, ref) == ev.spec_hi(ref, ref) == 0
    assert abs(ev.coherence(ref, ref) - 1) < 1e-9


def test_spectrum_coherence_and_lr_consistency_give_the_documented_numbers():
    ref, sr = pair(192, 256)
    lr = resized(ref, 64, 48)
    for image, *expected in ((sr, 0.9040, 0.9518, -0.0724, 0.7828, 30.567, 0.61891),
                             (resized(lr, 256, 192), -2.3721, 2.4553, -23.0046, 23.9895, 29.644, 0.05739)):
        found = (ev.spec_lo(image, ref), ev.spec_lo(image, ref, np.abs), ev.spec_hi(image, ref),
                 ev.spec_hi(image, ref, np.abs), ev.lr_psnr(image, lr), ev.coherence(image, ref))
        assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("size, full, limited", [
    ((193, 256), (20.3285, 20.0796), (20.0937, 19.9266)),
    ((512, 512), (18.8752, 18.2397), (18.6410, 18.0651))])
def test_niqe_gives_the_toolbox_numbers(size, full, limited):
    natural = ev.read_natural()
    assert [ev.niqe(image, natural) for image in pair(*size)] == pytest.approx(full, abs=5e-3)
    assert [ev.niqe(image, natural, True) for image in pair(*size)] == pytest.approx(limited, abs=1e-4)


def test_what_cannot_be_computed_is_nan():
    ref, sr = pair(160, 200)
    natural = np.zeros(36), np.eye(36)
    assert math.isnan(ev.ms_ssim_y(sr, ref)) and not math.isnan(ev.ssim_y(sr, ref))
    assert math.isnan(ev.ssim_y(sr[:10], ref[:10])) and math.isnan(ev.gmsd_y(sr[:3], ref[:3]))
    assert math.isnan(ev.niqe(np.full((200, 200, 3), 77, np.uint8), natural))
    assert math.isnan(ev.niqe(ref[:, :191], natural)) and not math.isnan(ev.niqe(ref[:, :192], natural))


@needs_published
@pytest.mark.parametrize("stem", ["Canon_001_LR4", "Canon_026_LR4", "Nikon_050_LR4"])
def test_published_outputs_score_what_their_authors_published(stem):
    """OSEDiff on RealSR. Canon_026 has clipped areas, where rounding errors decide about NIQE."""
    with open(PUBLISHED / "osediff_realsr_per_image.csv", newline="") as file:
        theirs = {row["image"]: row for row in csv.DictReader(file)}[stem]
    image, gt = (ev.read_pixels(folder / f"{stem}.webp")
                 for folder in (PUBLISHED / "osediff_outputs", PUBLISHED.parent / "HR"))
    assert abs(ev.psnr_y(image, gt) - float(theirs["psnr"])) < 1e-4
    assert abs(ev.ssim_y(image, gt) - float(theirs["ssim"])) < 2e-6
    assert abs(ev.niqe(image, ev.read_natural()) - float(theirs["niqe"])) < 0.02


# ---------------------------------------------------------------- statistics
def test_bootstrap_gives_the_documented_interval_and_wins_follow_the_metric():
    d = np.sin(1.7 * np.arange(40)) + 0.2
    assert ev.bootstrap(d) == pytest.approx((0.217372, 0.0034, 0.4365), abs=5e-5)
    ours = {str(i): dict.fromkeys(ev.METRICS, x) for i, x in enumerate(d)}
    theirs = {str(i): {"psnr_y": 0.0, "niqe": 0.0, "spec_hi": 0.5} for i in range(50)}
    result = ev.compare(ours, theirs)
    assert set(result) == set(theirs["0"]) and result["psnr_y"]["n"] == 40
    won = [result[name]["won"] for name in ("psnr_y", "niqe", "spec_hi")]
    assert won == [0.575, 0.425, np.mean(np.abs(d) < 0.5)]


# ---------------------------------------------------------------- protocols
@pytest.fixture
def pairs(tmp_path):
    """DATA with three pairs, 128x192 and 32x48 pixels."""
    for i, name in enumerate("abc"):
        hr = np.roll(pair(128, 192)[0], i, axis=0)
        for side, image in (("HR", hr), ("LR", resized(hr, 48, 32))):
            (tmp_path / "set" / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "set" / side / f"{name}.png")
    return tmp_path / "set"


@pytest.fixture
def call(pairs, request):
    """Runs the protocol `pairs` on them with a random tiny model; options as words."""
    def call(*options):
        argv = ["--protocol", "pairs", "--data", pairs, "--out", pairs.parent / "out", "--device", "cpu",
                "--weights", request.getfixturevalue("weights"), *options]
        return ev.evaluate(cli(ev.Config, argv=list(map(str, argv))))

    torch.set_num_threads(1)
    return call


def rows(folder):
    with open(folder / "per_image.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_pairs_give_a_bicubic_row_and_ours_of_what_sample_would_write(pairs, call, tmp_path, request, capsys):
    summary, table = call(), rows(tmp_path / "out")
    assert [(r["stem"], r["model"]) for r in table] == [(s, m) for s in "abc" for m in ("bicubic", "tiny")]
    assert list(table[0])[:4] == ["stem", "set", "height", "width"] and table[0]["set"] == "set"
    assert float(table[0]["lr_psnr"]) > float(table[1]["lr_psnr"])
    gain = sum(float(b["psnr_y"]) - float(a["psnr_y"]) for a, b in zip(table[::2], table[1::2], strict=True))
    assert summary["against"]["psnr_y"]["mean"] == pytest.approx(gain / 3, abs=2e-6)  # against bicubic
    assert (table[1]["steps"], table[1]["cfg_scale"], table[1]["dtype"]) == ("1", "", "fp32")
    assert len(table[1]["ckpt_sha256_8"]) == 8 and table[1]["ms_ssim_y"] == ""
    assert "warning: ms_ssim_y needs more pixels or detail, it is empty for 3 of 3" in capsys.readouterr().out
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["count"] == 3 and summary["means"]["HR"]["lr_psnr"] == 80 and not summary["failed"]
    ev.report(summary)
    assert "psnr_y" in capsys.readouterr().out
    vosr = load("tiny", 1, request.getfixturevalue("weights"), device="cpu")
    expected = upscale(Image.open(pairs / "LR" / "b.png"), vosr, name="b.png")
    assert np.array_equal(ev.read_pixels(tmp_path / "out" / "SR" / "b.png"), expected)


def test_seeds_are_averaged_within_a_picture(call, tmp_path):
    scores = []
    for options in (("--seed", 7), ("--seed", 8), ("--seed", 7, "--seeds", 2)):
        call("--limit", 1, *options)
        scores.append(float(rows(tmp_path / "out")[1]["psnr_rgb"]))
    assert scores[0] != scores[1] and abs(scores[2] - (scores[0] + scores[1]) / 2) < 2e-6
    assert (tmp_path / "out" / "SR-8" / "a.png").exists()


def test_folder_degrades_by_the_stem_alone_and_leaves_pairs_behind(call, tmp_path):
    photos, first, again = (tmp_path / name for name in ("photos", "first", "again"))
    photos.mkdir()
    Image.fromarray(pair(150, 200)[0]).save(photos / "x.png")
    Image.fromarray(pair(128, 140)[0]).save(photos / "a.jpg")
    folder = call("--protocol", "folder", "--data", photos, "--out", first)
    (photos / "a.jpg").unlink()
    for side, size in (("HR", (192, 128)), ("LR", (48, 32)), ("SR", (192, 128))):
        assert Image.open(first / side / "x.png").size == size
    mild = call("--protocol", "folder", "--data", photos, "--out", again, "--degradation", "mild")
    full = call("--protocol", "folder", "--data", photos, "--out", again)
    assert (first / "LR" / "x.png").read_bytes() == (again / "LR" / "x.png").read_bytes()
    assert mild["means"]["bicubic"]["psnr_y"] > full["means"]["bicubic"]["psnr_y"]
    paired = call("--data", first)
    assert paired["lr_sha256"] == folder["lr_sha256"] and paired["means"] == folder["means"]
    assert call("--protocol", "folder", "--data", "procedural", "--limit", 2, "--out", again)["count"] == 2


def test_the_protocol_decides_scale_and_guidance_unless_they_are_typed(pairs, call):
    for options, guidance in (((), 1.0), (("--protocol", "realsr"), 1.0),
                              (("--protocol", "realsr", "--cfg_scale", "0.7"), 0.7)):
        settings = call("--limit", 1, "--model", "tiny-ms", "--steps", 2, *options)["settings"]
        assert (settings["cfg_scale"], settings["scale"]) == (guidance, 4)
    for path in (pairs / "LR").iterdir():
        Image.fromarray(pair(128, 192)[1]).save(path)
    assert call("--protocol", "screensr", "--limit", 1)["means"]["bicubic"]["lr_psnr"] == 80


def test_from_scores_what_is_there_and_the_command_exits_1_for_what_is_broken(pairs, call, tmp_path):
    """Also the names that sample.py writes, and the comparison with an earlier run."""
    done = tmp_path / "done"
    done.mkdir()
    Image.open(pairs / "HR" / "a.png").save(done / "a_x4.png")
    Image.fromarray(pair(128, 192)[1]).save(done / "b.webp", lossless=True)
    summary = call("--from", done)
    assert summary["missing"] == ["c"] and [r["stem"] for r in rows(tmp_path / "out")] == [*"aabb"]
    summary = call("--from", done, "--against", tmp_path / "out" / "per_image.csv")
    assert summary["against"]["psnr_y"] == dict(mean=0, low=0, high=0, won=0, n=2)
    Image.new("RGB", (8, 8)).save(done / "b.webp")
    (pairs / "LR" / "a.png").write_bytes(b"")
    Image.open(pairs / "HR" / "c.png").save(done / "c.png")
    command = [sys.executable, ROOT / "evaluate.py", "--protocol", "pairs", "--data", pairs, "--from", done]
    result = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert result.returncode == 1 and "80.0000" in result.stdout and "Traceback" not in result.stderr
    assert "2 failed:\n  a:" in result.stderr and "b.webp is 8x8, its ground truth 192x128" in result.stderr


@pytest.mark.parametrize("spoil, words", [
    ("LR/b.png", "only one of HR/ and LR/: b"), ("HR/*", "holds no pictures"), ("HR", "is not a folder")])
def test_pictures_that_do_not_pair_end_the_call(pairs, call, capsys, spoil, words):
    for path in sorted(pairs.glob(spoil)):
        path.unlink() if path.is_file() else path.rename(pairs / "GT")
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    ("--protocol realsrr", "--protocol is one of folder, realsr"), ("--data=", "--data is needed"),
    ("--protocol folder --data nowhere", "nowhere"), ("--protocol folder --data procedural", "--limit"),
    ("--protocol folder --data SET/HR --out SET/HR/out", "lies inside --data"),
    ("--protocol folder --data SET/HR --degradation heavy", "unknown degradation 'heavy'"),
    ("--metric_weights SET/x.npz", "niqe_pris_params.npz"), ("--against SET/HR/a.png", "per_image.csv"),
    ("--seeds 0", "--seeds starts at 1"), ("--model huge", "huge"), ("--from SET/LR", "a.png is 48x32"),
    ("--scale 2", "192x128, not 2 times"), ("--protocol folder --data SET", "tars or pairs")])
def test_a_wrong_call_ends_with_one_line_and_code_2(pairs, call, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        call(*options.replace("SET", str(pairs)).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.startswith("error:") and error.count("\n") == 1
