"""The helpers in tools/, run as a user runs them."""
import subprocess
import sys
from pathlib import Path

from PIL import Image

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
