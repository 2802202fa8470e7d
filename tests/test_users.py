"""What users feed to image software: one test a row of the list of hostile and bad inputs, by its number."""
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import test_sample
import test_sample_command
import torch
from PIL import Image, ImageCms
from test_sample import picture

import sample
from model import VOSR
from sample import upscale

weights, student = test_sample.weights, test_sample.student  # fixtures
command = test_sample_command.command
ROOT = Path(__file__).parent.parent


def result(path):
    with Image.open(path) as image:
        image.load()
        return image


@pytest.mark.parametrize("size", [(300, 200), (123, 77), (1, 1), (1, 500)])
def test_rows_01_to_03_any_shape_comes_out_exact(command, tmp_path, size):
    picture(*size).save(tmp_path / "a.png")
    assert command("--scale", "4", "a.png")[0] == 0
    assert result(tmp_path / "a_x4.png").size == tuple(4 * side for side in size)


def test_row_04_orientation_is_applied_once(command, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (24, 16), "white")
    image.paste("black", (0, 0, 12, 16))
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    assert command("a.jpg")[0] == 0
    upright = result(tmp_path / "a_x4.png")
    assert upright.size == (64, 96) and not upright.getexif()
    levels = np.asarray(upright.convert("L"), float)
    assert levels[:40].mean() < 60 and levels[56:].mean() > 190


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_row_05_transparency_is_kept_and_does_not_darken_colours(command, tmp_path, mode):
    alpha = Image.new("L", (16, 16), 255)
    alpha.paste(0, (0, 0, 8, 16))
    image = picture(16, 16)
    image.putalpha(alpha)
    image.convert(mode).save(tmp_path / "a.png")
    assert command("a.png")[0] == 0
    opacity = np.asarray(result(tmp_path / "a_x4.png").getchannel("A"), float)
    assert opacity.shape == (64, 64) and opacity[:, :24].max() < 20 and opacity[:, 40:].min() > 235


def test_row_06_16_bits_are_scaled_not_clipped(command, tmp_path, student):
    grey = picture(16, 12, bands=1)
    Image.fromarray(np.asarray(grey) * np.uint16(257)).save(tmp_path / "a.png")
    code, out, _ = command("a.png")
    assert code == 0 and "16 bits per channel become 8" in out
    assert np.array_equal(result(tmp_path / "a_x4.png"), upscale(grey, student, name="a.png"))


def test_row_07_cmyk_becomes_rgb_and_says_how(command, tmp_path):
    picture(16, 12).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    code, out, _ = command("a.jpg")
    assert code == 0 and "CMYK" in out and result(tmp_path / "a_x4.png").mode == "RGB"


def test_row_08_grey_stays_grey(command, tmp_path):
    picture(16, 12, bands=1).save(tmp_path / "a.jpg")
    assert command("a.jpg")[0] == 0 and result(tmp_path / "a_x4.png").mode == "L"


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_row_09_pixels_of_unknown_range_are_refused(command, tmp_path, dtype):
    Image.fromarray(np.full((8, 8), 70000, dtype)).save(tmp_path / "a.tif")
    code, _, err = command("a.tif")
    assert code == 2 and "a.tif" in err and "unknown range" in err and err.count("\n") == 1


def test_row_10_the_first_frame_of_an_animation(command, tmp_path, student):
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    code, out, _ = command("a.gif")
    assert code == 0 and "first of 3 frames" in out
    red, _, blue = np.asarray(result(tmp_path / "a_x4.png"), float).mean(axis=(0, 1))
    assert red > 200 and blue < 50


def test_rows_11_12_13_bad_files_of_a_folder_are_named_and_the_rest_is_finished(command, tmp_path):
    (tmp_path / "in").mkdir()
    picture(16, 12).save(tmp_path / "in/good.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut1.jpg", "cut2.png"):
        noise.save(tmp_path / "in" / name)
        data = (tmp_path / "in" / name).read_bytes()
        (tmp_path / "in" / name).write_bytes(data[:len(data) // 2])
    (tmp_path / "in/empty.png").write_bytes(b"")
    (tmp_path / "in/text.png").write_text("hello")
    for name in ("._good.png", "notes.json"):
        (tmp_path / "in" / name).write_text("{}")
    code, _, err = command("in", "-o", "out")
    assert code == 1 and [p.name for p in (tmp_path / "out").iterdir()] == ["good_x4.png"]
    assert err.splitlines()[-1].startswith("error: 4 of 5 failed")
    assert all(name in err for name in ("cut1.jpg", "cut2.png", "empty.png", "text.png"))


def test_rows_14_15_odd_names_and_upper_case_endings(command, tmp_path):
    for name in ("ü ñ 日本.JPG", "a b.TIFF", "-dash.Png"):
        picture(8, 8).save(tmp_path / name)
    assert command("--", "ü ñ 日本.JPG", "a b.TIFF", "-dash.Png")[0] == 0
    assert {p.name for p in tmp_path.glob("*_x4.png")} == {"ü ñ 日本_x4.png", "a b_x4.png", "-dash_x4.png"}


def test_rows_16_17_18_clashes_and_empty_calls_end_before_work(command, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.jpg", "a.png"):
        picture(8, 8).save(tmp_path / name)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("a.*")}
    for words in (("a.jpg", "a.png"), ("empty",), ("nowhere",), ("*.webp",)):
        code, _, err = command(*words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert command("*.png", "-o", ".")[0] == 0                       # a pattern that the shell left alone
    assert {p.name for p in tmp_path.glob("*.png")} == {"a.png", "a_x4.png"}


def test_row_19_an_output_folder_that_cannot_be_is_found_before_the_work(command, tmp_path):
    picture(8, 8).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("no folder")
    code, _, err = command("a.png", "-o", "file/out")
    assert code == 2 and "file/out" in err and err.count("\n") == 1


def test_outputs_never_leave_the_chosen_folder(command, tmp_path):
    """Not by the way in which an input is named, not by a link that is there already."""
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    picture(8, 8).save(tmp_path / "in/a.png")
    (tmp_path / "victim.png").write_bytes(b"kept")
    (tmp_path / "out/a_x4.png").symlink_to(tmp_path / "victim.png")
    assert command("in/deep/../a.png", "--overwrite", "-o", "out")[0] == 0
    assert (tmp_path / "victim.png").read_bytes() == b"kept" and not (tmp_path / "out/a_x4.png").is_symlink()
    picture(8, 8).save(tmp_path / "in/deep/b.png")
    (tmp_path / "out/deep").symlink_to(tmp_path)
    code, _, err = command("in", "-o", "out")
    assert code == 2 and "leads out of out" in err and not (tmp_path / "b_x4.png").exists()


def test_a_side_that_the_format_cannot_hold_is_refused_before_the_work(command, tmp_path, monkeypatch):
    picture(8, 8).save(tmp_path / "a.png")
    monkeypatch.setattr(sample, "restore", None)
    code, _, err = command("--ext", "webp", "--size", "16384x8", "a.png")
    assert code == 2 and "16383" in err and "PNG" in err


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


def test_rows_20_21_huge_pictures_are_refused_by_their_header(command, tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(60000, 60000))
    start = time.perf_counter()
    code, _, err = command("a.png")
    assert code == 2 and "60000x60000" in err and "--max_pixels" in err and time.perf_counter() - start < 5
    picture(20, 20).save(tmp_path / "b.png")
    assert command("--max_pixels", "399", "b.png")[0] == 2 and command("--max_pixels", "400", "b.png")[0] == 0


@pytest.mark.parametrize("color", ["wavelet", "adain", "none"])
def test_row_22_a_flat_picture_stays_flat_and_keeps_its_colour(color):
    bundled = sample.load("tiny", 1, ROOT / "weights", device="cpu")
    levels = np.asarray(upscale(Image.new("RGB", (16, 16), (200, 100, 50)), bundled, color=color), float)
    assert abs(levels.mean(axis=(0, 1)) - (200, 100, 50)).max() < (25 if color == "none" else 3)
    assert levels.std(axis=(0, 1)).max() < 6


def test_row_23_a_result_that_is_not_finite_is_done_again_in_fp32(weights, student, monkeypatch, capsys):
    velocity, half = VOSR.velocity, sample.load("tiny", 1, weights, "fp16", "cpu")
    monkeypatch.setattr(VOSR, "velocity", lambda self, *rest: velocity(self, *rest) * (
        float("inf") if torch.is_autocast_enabled("cpu") else 1))
    assert np.array_equal(upscale(picture(8, 8), half, name="x"), upscale(picture(8, 8), student, name="x"))
    assert "fp32" in capsys.readouterr().err


def test_rows_24_25_26_wrong_files_and_networks():
    """tests/test_published.py has these rows, each wrong pairing with the line that it gets."""
    from test_published import WRONG
    assert {"truncated file", "encoder that is code", "multi-step file as student"} <= WRONG.keys()


@pytest.mark.parametrize("scale", ["1", "2", "3", "2.5", "6"])
def test_row_27_any_scale(command, tmp_path, scale):
    picture(20, 10).save(tmp_path / "a.png")
    assert command("--scale", scale, "a.png")[0] == 0
    wanted = tuple(round(side * float(scale)) for side in (20, 10))
    assert result(tmp_path / f"a_x{scale}.png").size == wanted


def test_row_28_a_repeated_call_does_only_what_is_missing(command, tmp_path):
    picture(8, 8).save(tmp_path / "a.png")
    assert command("a.png")[0] == 0
    written = (tmp_path / "a_x4.png").stat().st_mtime_ns
    picture(8, 8).save(tmp_path / "b.png")
    assert command("a.png", "b.png")[0] == 0
    assert (tmp_path / "a_x4.png").stat().st_mtime_ns == written and (tmp_path / "b_x4.png").is_file()


def test_row_29_without_a_gpu_the_cpu_works_and_a_gpu_that_is_not_there_is_named(command, tmp_path):
    picture(8, 8).save(tmp_path / "a.png")
    code, _, err = command("--device", "cuda:0", "a.png")
    assert code == (0 if torch.cuda.is_available() else 2) and ("cpu would work" in err or not code)


def test_outputs_in_other_formats_and_without_the_profile(command, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(16, 12).save(tmp_path / "a.png", icc_profile=profile)
    for ext, form in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF")):
        assert command("--ext", ext, "a.png")[0] == 0
        image = result(tmp_path / f"a_x4.{ext}")
        assert image.format == form and image.size == (64, 48) and image.info["icc_profile"] == profile
    assert command("--strip", "--overwrite", "a.png")[0] == 0
    assert "icc_profile" not in result(tmp_path / "a_x4.png").info


def test_interrupting_keeps_what_is_finished(weights, tmp_path):
    for name in "abc":
        picture(8, 8).save(tmp_path / f"{name}.png")
    code = ("import sys, sample, config; real = sample.run\n"
            "def run(source, *rest):\n    real(source, *rest)\n    raise KeyboardInterrupt\n"
            "sample.run = run; config.launch(sample.main)")
    done = subprocess.run([sys.executable, "-c", code, "--weights", weights, "--device=cpu", tmp_path],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130 and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.glob("*_x4.png")] == ["a_x4.png"]
