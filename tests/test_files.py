"""Pictures from and to files: hostile, broken and unusual ones. Row numbers count a list of such inputs."""
import random
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageCms

import data

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY = SRGB[:16] + b"GRAY" + SRGB[20:128]  # only its header counts here


def picture(width=24, height=16, mode="RGB"):
    """Smooth in every band, with full range."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    bands = [np.uint8(np.rint(255 * band)) for band in (x, y, 1 - x, (x + y) / 2)]
    return Image.merge("RGBA", [Image.fromarray(band) for band in bands]).convert(mode)


def png(path, width, height, bits, kind, levels=b""):
    """Write a PNG by hand: what Pillow cannot write, or a header that promises too much."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0),
              b"IDAT" + zlib.compress(b"\0" + levels), b"IEND")  # a single line of pixels
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def cmyk_profile():
    """A printer of three colours: K is black; without it C is mid-grey (L = 50.2), everything else white."""
    table = [(0 if k else 128 if c else 255, 128, 128) for c, _, _, k in np.ndindex(2, 2, 2, 2)]
    unit, ramp = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9))), bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + unit + ramp * 4 + bytes(sum(table, ())) + ramp * 3
    head = struct.pack(">I4sI4s4s4s", 144 + len(lut), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


def read(path):
    return data.split_picture(data.open_picture(path))


def refused(path, words, **options):
    """Whether a file is refused with one line that names it and holds the words."""
    with pytest.raises(ValueError) as error:
        data.open_picture(path, **options)
    assert words in (line := str(error.value)) and line.startswith(str(path)) and "\n" not in line


def same(a, b, error=0):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).max() <= error


@pytest.mark.parametrize("name", ["a.png", "-a.JPG", "\u00fc \u5199\u771f.webp", "b c.TIF"])
def test_rows_03_14_and_15_sizes_and_names_of_every_kind_work(tmp_path, name):
    for size in ((1, 1), (1, 50), (50, 1), (123, 77)):
        data.write_image(tmp_path / name, picture(*size))
        assert data.open_picture(tmp_path / name).size == size
    assert data.open_source(tmp_path).names == [str(tmp_path / name)]


@pytest.mark.parametrize("ext", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation, turn", [(3, "ROTATE_180"), (6, "ROTATE_270"), (7, "TRANSVERSE")])
def test_row_04_orientation_is_applied_once(tmp_path, ext, orientation, turn):
    exif, path = Image.Exif(), tmp_path / f"a.{ext}"
    exif[0x0112] = orientation
    picture().save(path, exif=exif, quality=100, subsampling=0)
    upright = data.open_picture(path)
    assert same(upright, picture().transpose(Image.Transpose[turn]), 0 if ext in ("png", "tif") else 12)
    assert 0x0112 not in upright.getexif()
    own = Image.open(path)  # of a user of the library
    assert all(same(data.split_picture(image).rgb, upright) for image in (upright, own))
    assert same(data.read_levels(path).permute(1, 2, 0), upright)
    assert own.size == (upright if ext == "tif" else picture()).size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_row_05_alpha_is_split_off_with_the_colours_below_it(mode):
    whole = picture(mode="RGBA")
    image = whole.convert("LA").convert("La") if mode == "La" else whole.convert(mode)
    rgb, alpha, grey, *_ = data.split_picture(image)
    assert same(alpha, whole.getchannel("A")) and grey == (mode in ("LA", "La"))
    wanted = image.convert("LA" if grey else "RGBA").convert("RGBA")
    assert same(rgb, np.asarray(wanted)[..., :3])


def test_row_05_a_transparent_colour_of_a_palette_is_alpha(tmp_path):
    image, path = Image.frombytes("P", (2, 1), b"\0\1"), tmp_path / "a.png"
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(path, transparency=0)
    rgb, alpha, grey, *_ = read(path)
    assert same(alpha, [[0, 255]]) and rgb.getpixel((1, 0)) == (0, 0, 255) and not grey
    assert same(data.read_levels(path).permute(1, 2, 0), [[[255, 255, 255], [0, 0, 255]]])


def test_row_06_grey_of_16_bits_is_divided_by_257_and_rounded(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for ext in ("png", "tif"):
        Image.fromarray(levels).save(tmp_path / f"a.{ext}")
    (tmp_path / "a.ppm").write_bytes(b"P5 256 256 65535\n" + levels.astype(">u2").tobytes())
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        rgb, alpha, grey, _, notes = read(path)
        assert same(rgb.getchannel("R"), np.rint(levels / 257)) and grey and alpha is None
        assert notes == ("16 bits per channel become 8",)
        assert same(data.open_source(tmp_path).image(number)[2], rgb.getchannel("B"))


@pytest.mark.parametrize("kind, bands", [(2, 3), (4, 2), (6, 4)])
def test_row_06_colours_and_alpha_of_16_bits_are_scaled(tmp_path, kind, bands):
    """Pillow itself drops the lower byte, less than a level."""
    levels = np.linspace(0, 65535, 64).astype(">u2")
    png(tmp_path / "a.png", 64, 1, 16, kind, levels.repeat(bands).tobytes())
    rgb, alpha, grey, _, notes = read(tmp_path / "a.png")
    assert notes == ("16 bits per channel become 8",) and grey == (kind == 4)
    assert same(rgb.getchannel("G"), levels / 257, 1)
    assert alpha is None if kind == 2 else same(alpha, levels / 257, 1)


def test_row_07_cmyk_is_converted_by_its_profile_or_naively(tmp_path, monkeypatch):
    """Cyan is grey as the profile prints it. JPEG holds CMYK inverted, as Adobe does; Pillow undoes it."""
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    image.paste(0, (0, 0, 8, 16))
    for name, profile in (("plain", None), ("bad", SRGB), ("good", cmyk_profile())):
        image.save(tmp_path / f"{name}.jpg", icc_profile=profile, quality=100)
        assert b"Adobe" in (tmp_path / f"{name}.jpg").read_bytes()
    good, *others = (read(tmp_path / f"{name}.jpg") for name in ("good", "bad", "plain"))
    assert same(good.rgb.getpixel((12, 8)), 119, 2) and same(good.rgb.getpixel((2, 8)), 255, 1)
    assert good.notes == ("CMYK converted to sRGB by its profile",) and good.icc is None
    monkeypatch.setattr(ImageCms, "createProfile", Mock(side_effect=ImportError))  # no LittleCMS
    for result in (*others, read(tmp_path / "good.jpg")):
        assert same(result.rgb.getpixel((12, 8)), (0, 255, 255), 2) and "naively" in result.notes[0]
        assert same(result.rgb.getpixel((2, 8)), 255, 1)


@pytest.mark.parametrize("ext", ["jpg", "png", "tif", "webp"])
def test_row_08_grey_stays_grey(tmp_path, ext):
    data.write_image(tmp_path / f"a.{ext}", picture(), grey=True, icc=GREY)
    rgb, alpha, grey, *_ = read(tmp_path / f"a.{ext}")
    assert same(rgb, picture(mode="L").convert("RGB"), 4) and alpha is None and grey == (ext != "webp")
    assert Image.open(tmp_path / f"a.{ext}").info.get("icc_profile") == (GREY if grey else None)


def test_row_09_pixels_of_unknown_range_are_refused(tmp_path):
    for dtype, mode in ((np.float32, "F"), (np.int32, "I")):
        image, path = Image.fromarray(np.ones((3, 4), dtype)), tmp_path / f"{mode}.tif"
        image.save(path)
        refused(path, f"unknown range, mode {mode}")
        with pytest.raises(ValueError, match=f"unknown range, mode {mode}"):
            data.split_picture(image)


@pytest.mark.parametrize("ext", ["gif", "tif", "webp", "png", "mpo"])
def test_row_10_the_first_frame_is_used_and_said(tmp_path, ext):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{ext}", save_all=True, append_images=frames[1:], lossless=True)
    rgb, *_, notes = read(tmp_path / f"a.{ext}")
    assert same(rgb, frames[0], 2) and notes == (() if ext == "mpo" else ("first of 3 frames",))  # of a phone


@pytest.mark.parametrize("ext", ["jpg", "png", "webp", "tif", "gif", "bmp"])
def test_row_11_truncated_files_are_refused(tmp_path, ext):
    path = tmp_path / f"a.{ext}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(whole[:int(share * len(whole))])
        refused(path, "is not an image that can be read")


@pytest.mark.filterwarnings("ignore")
def test_row_11_broken_files_raise_nothing_but_value_error(tmp_path):
    draw, path, refusals = random.Random(0), tmp_path / "a", []
    for ext in ("png", "jpeg", "webp", "tiff", "gif", "bmp"):
        picture(40, 30).save(path, ext)
        whole = path.read_bytes()
        for n in range(100):
            broken = bytearray(whole)
            for _ in range(1 + n % 6):
                broken[draw.randrange(min(len(broken), 300))] = draw.randrange(256)
            path.write_bytes(broken)
            try:
                data.split_picture(data.open_picture(path, max_pixels=10_000))
            except ValueError as error:
                refusals.append(str(error))
    assert len(refusals) > 100 and not any("\n" in line for line in refusals)


def test_rows_12_and_17_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    png(tmp_path / "nothing.png", 0, 4, 8, 2)
    for name, words in (("empty.png", "(it is empty)"), ("text.png", "is not an image that can be read"),
                        ("nothing.png", "is not an image"), (".", "a folder"), ("text.png/a", "not exist")):
        refused(tmp_path / name, words)


def test_row_19_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "a.webp").write_text("before")
    (tmp_path / "b.png").mkdir()
    for name, size, error in (("a.webp", (2, 16384), "has 16383 at most; PNG"),
                              ("c.JPEG", (65501, 1), "has 65500 at most; PNG"), ("b.png", (2, 2), "b.png")):
        with pytest.raises((ValueError, OSError), match=error):
            data.write_image(tmp_path / name, Image.new("RGB", size))
    assert {p.name for p in tmp_path.iterdir()} == {"a.webp", "b.png"}
    assert (tmp_path / "a.webp").read_text() == "before" and (tmp_path / "b.png").is_dir()


@pytest.mark.filterwarnings("error")
def test_rows_20_and_21_too_many_pixels_are_refused_from_the_header(tmp_path, monkeypatch):
    """Pillow's own limit, here of 100 pixels, neither matters nor changes, also in several threads."""
    png(tmp_path / "bomb.png", 60000, 60000, 8, 2)
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    start = time.perf_counter()
    refused(tmp_path / "bomb.png", f"has 60000x60000 pixels, the limit is {data.MAX_PIXELS}; --max_pixels")
    assert time.perf_counter() - start < 1
    refused(tmp_path / "a.png", "has 24x16 pixels, the limit is 383", max_pixels=383)
    with ThreadPoolExecutor(8) as pool:
        assert [p.size for p in pool.map(data.open_picture, [tmp_path / "a.png"] * 32)] == [(24, 16)] * 32
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("ext, error", [("png", 0), ("tif", 0), ("webp", 9), ("JPG", 9)])
def test_colours_alpha_and_profile_survive_a_round_trip(tmp_path, ext, error):
    """JPEG is composited on white; the pictures that were given stay as they are."""
    rgb, alpha, path = picture(), picture(mode="RGBA").getchannel("A"), tmp_path / f"a.{ext}"
    data.write_image(path, rgb, alpha, icc=SRGB)
    again, share = read(path), np.asarray(alpha)[..., None] / 255
    assert same(rgb, picture()) and again.icc == SRGB and not again.grey
    seen = data.read_levels(path).permute(1, 2, 0)
    assert same(seen, np.asarray(rgb) * share + 255 * (1 - share), error + 1)
    assert again.alpha is None if ext == "JPG" else same(again.alpha, alpha)


def test_a_profile_is_kept_only_where_it_describes_the_pixels():
    for mode, icc, kept in (("P", SRGB, 1), ("RGB", SRGB, 1), ("P", GREY, 0), ("L", GREY, 1), ("L", SRGB, 0)):
        (image := picture(mode=mode)).info["icc_profile"] = icc
        assert data.split_picture(image).icc == (icc if kept else None)


@pytest.mark.parametrize("mode", ["1", "P", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (3, 2), "white" if mode == "1" else (204, 102, 51))
    rgb, alpha, grey, _, notes = data.split_picture(image.convert(mode))
    assert same(rgb, image, 2) and (alpha, grey, notes) == (None, mode == "1", ())
