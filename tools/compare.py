"""Show pictures of the same thing side by side: a PNG strip, and a page with a slider that needs no network.

    python tools/compare.py input.png input_x4.png              # compare.png and compare.html
    python tools/compare.py a.png b.png c.png --labels bicubic,ours,original --box 0.3,0.1,0.7,0.5 -o strip

Smaller pictures are enlarged to the largest by bicubic, so an input beside its result is its bicubic
enlargement. The page compares the first two.
"""
import base64
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, die

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{margin:0;background:#222;color:#eee;font:16px sans-serif;text-align:center}}
div{{position:relative;display:inline-block}}img{{display:block;max-width:100vw;max-height:88vh}}
#b{{position:absolute;top:0;left:0;clip-path:inset(0 0 0 50%)}}input{{width:90%;margin:12px}}</style>
<div><img src="{a}"><img id="b" src="{b}"></div>
<br>{left} <input type="range" min="0" max="100" value="50" style="width:60%"
 oninput="document.getElementById('b').style.clipPath='inset(0 0 0 '+this.value+'%)'"> {right}
"""


@dataclass
class Config:
    labels: str = ""  # captions, separated by commas; default: the file names
    box: tuple = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom of the part to show, as shares of the sides
    height: int = 0  # height of the strip in pixels; 0: as large as the largest picture
    out: str = "compare"  # name without ending (also -o)
    inputs: tuple = ()  # two or more pictures


def load(paths, box):
    """Pictures of one size, cut to the box."""
    try:
        pictures = [Image.open(path).convert("RGB") for path in paths]
    except (OSError, ValueError) as reason:
        die(reason)
    size = max(p.size for p in pictures)
    corners = [round(share * size[i % 2]) for i, share in enumerate(box)]
    return [p.resize(size, Image.Resampling.BICUBIC).crop(corners) for p in pictures]


def strip(pictures, labels, height):
    """One row with a caption below each picture."""
    if height:
        pictures = [p.resize((round(p.width * height / p.height), height), Image.Resampling.LANCZOS)
                    for p in pictures]
    width, tall = pictures[0].size
    sheet = Image.new("RGB", (len(pictures) * (width + 4) - 4, tall + 24), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        sheet.paste(picture, (i * (width + 4), 0))
        place = (i * (width + 4) + width // 2, tall + 4)
        canvas.text(place, label, "black", ImageFont.load_default(14), anchor="ma")
    return sheet


def embedded(picture):
    """PNG as the address of an image in a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main():
    cfg = cli(Config)
    if len(cfg.inputs) < 2:
        die("name two or more pictures, as in python tools/compare.py before.png after.png")
    labels = cfg.labels.split(",") if cfg.labels else [Path(name).stem for name in cfg.inputs]
    if len(labels) != len(cfg.inputs):
        die(f"--labels has {len(labels)} captions for {len(cfg.inputs)} pictures")
    pictures = load(cfg.inputs, cfg.box)
    strip(pictures, labels, cfg.height).save(cfg.out + ".png")
    page = PAGE.format(title=" | ".join(labels[:2]), a=embedded(pictures[0]), b=embedded(pictures[1]),
                       left=labels[0], right=labels[1])
    Path(cfg.out + ".html").write_text(page)
    print(f"wrote {cfg.out}.png and {cfg.out}.html")


if __name__ == "__main__":
    main()
