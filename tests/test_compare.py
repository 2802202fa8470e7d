"""The before/after page and the strip of tools/compare.py, read back from what it writes."""
import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tools.compare import launch, main

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Run the tool as a command in an empty folder with a.png (10 x 8, red) and b.png (40 x 32, blue)."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (10, 8), RED).save("a.png")
    Image.new("RGB", (40, 32), BLUE).save("b.png")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        launch(main)
        return tmp_path

    return run


class Page(HTMLParser):
    """Elements of a page as (name, attributes), its text, and its embedded pictures."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.source = [], "", path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def pictures(self):
        for tag, attrs in self.elements:
            if tag == "img":
                start, _, data = attrs["src"].partition(",")
                assert start == "data:image/png;base64"
                yield Image.open(io.BytesIO(base64.b64decode(data, validate=True)))

    def slider(self):
        (found,) = [attrs for _, attrs in self.elements if attrs.get("role") == "slider"]
        return found


def refusal(capsys, compare, *words):
    """The one line with which a wrong call ends."""
    with pytest.raises(SystemExit) as end:
        compare(*words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_page_needs_nothing_but_itself_and_holds_both_pictures(compare):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    for name, picture in zip(("x.png", "y.png"), pixels, strict=True):
        Image.fromarray(picture).save(name)
    page = Page(compare("x.png", "y.png") / "compare.html")
    for picture, want in zip(page.pictures(), pixels, strict=True):
        assert np.array_equal(picture, want)
    rest = re.sub(r"data:image/png;base64,[\w+/=]+", "", page.source)
    assert not re.search(r"http|//[\w.]+\.\w|url\(|@import|fetch", rest)
    assert {tag for tag, _ in page.elements} & {"link", "iframe", "object", "base"} == set()
    assert all("src" not in attrs for tag, attrs in page.elements if tag == "script")


def test_the_divider_is_a_slider_for_keyboard_and_screen_reader(compare):
    page = Page(compare("a.png", "b.png") / "compare.html")
    slider = page.slider()
    assert slider["tabindex"] == "0" and slider["aria-label"] == "divider between a and b"
    assert [slider[f"aria-value{name}"] for name in ("min", "now", "max")] == ["0", "50", "100"]
    assert "slider.onkeydown" in page.source and "#slider:focus-visible" in page.source
    assert '"aria-valuenow"' in page.source
    for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"):
        assert f"{key}: " in page.source


def test_touch_narrow_windows_and_dark_mode_are_provided_for(compare):
    source = Page(compare("a.png", "b.png") / "compare.html").source
    for part in ("width=device-width", "touch-action", "onpointerdown", "color-scheme: light dark",
                 "aspect-ratio: 40 / 32", "image-rendering: pixelated", "devicePixelRatio"):
        assert part in source, part


def test_labels_are_text_wherever_they_stand(compare):
    label = """<b>"$a" & 'it'</b>"""
    page = Page(compare("a.png", "b.png", "--labels", f"{label},Größe") / "compare.html")
    assert "b" not in {tag for tag, _ in page.elements}
    assert [attrs["alt"] for tag, attrs in page.elements if tag == "img"] == [label, "Größe"]
    assert page.slider()["aria-label"] == f"divider between {label} and Größe"
    assert page.text.count(label) == 2      # the title and the line above the picture


def test_the_smaller_picture_is_enlarged_by_bicubic(compare):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    folder = compare("a.png", "b.png")
    first, second = Page(folder / "compare.html").pictures()
    want = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(first, want) and second.size == (40, 32)
    strip = Image.open(folder / "compare.png")
    assert strip.size == (84, 56) and np.array_equal(strip.crop((0, 0, 40, 32)), want)


def test_more_pictures_make_a_longer_strip_and_the_page_shows_the_first_two(compare):
    Image.new("RGB", (40, 32), WHITE).save("c.png")
    folder = compare("b.png", "a.png", "c.png", "--box", "0.25,0.5,0.75,1", "--height", "8")
    assert Image.open(folder / "compare.png").size == (3 * 14 - 4, 8 + 24)
    first, second = Page(folder / "compare.html").pictures()
    assert (first.size, second.size) == ((20, 16), (20, 16))
    assert (first.getpixel((0, 0)), second.getpixel((0, 0))) == (BLUE, RED)


def test_grey_16_bits_transparency_and_orientation_are_read_as_everywhere_here(compare):
    ramp = np.arange(0, 256, 2, dtype=np.uint8).reshape(8, 16)
    Image.fromarray(ramp).save("grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save("deep.png")
    for picture in Page(compare("grey.png", "deep.png") / "compare.html").pictures():
        assert np.array_equal(picture, np.repeat(ramp[..., None], 3, 2))
    clear = Image.new("RGBA", (16, 8), (*RED, 0))
    clear.paste((*BLUE, 255), (8, 0, 16, 8))
    clear.save("clear.png")
    turned = Image.new("RGB", (8, 16), BLUE)
    turned.paste(WHITE, (0, 8, 8, 16))      # to be turned by a quarter, which brings white to the left
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save("turned.png", exif=exif)
    clear, turned = Page(compare("clear.png", "turned.png") / "compare.html").pictures()
    assert clear.size == (16, 8) and clear.getpixel((2, 4)) == WHITE and clear.getpixel((12, 4)) == BLUE
    assert np.array_equal(clear, turned)


@pytest.mark.parametrize("out, stem", [
    ("strip", "strip"), ("strip.html", "strip"), ("strip.png", "strip"), ("v1.5", "v1.5"),
    ("new/deep/strip", "new/deep/strip"), ("new/", "new/compare"), (".", "compare")])
def test_output_is_named_without_ending_or_by_a_folder_that_is_made(compare, capsys, out, stem):
    folder = compare("a.png", "b.png", "-o", out)
    assert {path for path in folder.rglob("*.*") if path.is_file()} == {
        folder / name for name in ("a.png", "b.png", f"{stem}.png", f"{stem}.html")}
    assert capsys.readouterr().out == f"wrote {stem}.png and {stem}.html\n"


def test_wrong_calls_end_in_one_line(compare, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for words, part in [
            (["a.png"], "two or more pictures"), (["missing.png", "b.png"], "missing.png"),
            (["text.png", "b.png"], "text.png is not an image"), ([".", "b.png"], "is a folder"),
            (["a.png", "b.png", "--labels", "one"], "1 captions for 2"),
            (["a.png", "b.png", "--box", "0.5,0,0.5,1"], "--box wants"),
            (["a.png", "b.png", "--box", "0,0,1,2"], "--box wants"),
            (["a.png", "b.png", "--height", "-3"], "--height wants"),
            (["a.png", "b.png", "-o", "text.png/x"], "text.png"),
            (["a.png", "b.png", "-o", "b"], "b.png is one of the pictures")]:
        assert part in refusal(capsys, compare, *words), words
    assert Image.open("b.png").size == (40, 32) and not list(tmp_path.glob("*.html"))
