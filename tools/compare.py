"""Show pictures of the same thing side by side: a PNG strip, and a page with a slider that needs no network.

    python tools/compare.py input.png input_x4.png              # compare.png and compare.html
    python tools/compare.py a.png b.png c.png --labels bicubic,ours,original --box 0.3,0.1,0.7,0.5 -o strip

Smaller pictures are enlarged to the largest by bicubic, so an input beside its result is its bicubic
enlargement. The page compares the first two; it fits them to the window or shows 1, 2 or 4 pixels of the
screen per pixel. Drag the divider, or move it by arrow keys (with Shift ten times as far), Home and End.
"""
import base64
import io
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, die, launch
from data import read_image, to_pillow

# The divider stands at p percent of what is visible, so it stays in sight while an enlarged picture is
# scrolled under it. At "fit" a finger on the picture moves the divider, otherwise it scrolls the picture.
PAGE = Template("""<!doctype html><html lang="en"><meta charset="utf-8"><title>$left | $right</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --tall: max(100px, 100dvh - 90px) }
body { margin: 0; padding: 8px 20px; font: 16px/24px sans-serif; text-align: center;
  overflow-wrap: anywhere; container-type: inline-size }
#frame { position: relative; display: inline-block; max-width: 100%; margin-top: 8px; user-select: none }
#view { overflow: hidden; max-height: var(--tall) } #view.zoomed { overflow: auto }
#pair { position: relative; cursor: ew-resize; touch-action: pan-y pinch-zoom; aspect-ratio: $width / $height;
  width: min(100cqw, var(--tall) * $width / $height) } .zoomed #pair { touch-action: auto }
img { position: absolute; width: 100%; height: 100%; inset: 0; pointer-events: none }
body:has(#squares:checked) img { image-rendering: pixelated }
#slider { position: absolute; top: 0; width: 40px; margin-left: -20px; cursor: ew-resize; touch-action: none;
  outline: none }
#slider::before, #slider::after { position: absolute; background: #fff; box-shadow: 0 0 0 1px #000 }
#slider::before { content: ""; left: 19px; width: 2px; height: 100% }
#slider::after { content: "\\2039\\2002\\203a"; left: 4px; bottom: 8px; width: 32px; border-radius: 16px;
  font: bold 20px/30px sans-serif; color: #000 }
#slider:focus-visible::after { outline: 4px solid #06f; box-shadow: 0 0 0 6px #fff }
</style>
<div>$left &ensp;|&ensp; $right</div>
<div id="frame">
<div id="view"><div id="pair"><img src="$a" alt="$left"><img id="after" src="$b" alt="$right"></div></div>
<div id="slider" role="slider" tabindex="0" aria-label="divider between $left and $right"
 aria-valuemin="0" aria-valuemax="100" aria-valuenow="50"></div>
</div>
<div><label>zoom <select id="zoom"><option value="0">fit<option value="1">1:1<option value="2">2:1
<option value="4">4:1</select></label> <label><input type="checkbox" id="squares"> square pixels</label></div>
<script>
const [view, pair, after, slider, zoom] = ["view", "pair", "after", "slider", "zoom"].map(
  name => document.getElementById(name))
const KEYS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -100, End: 100 }
let p = 50, held  // the pointer that drags
function move(percent) {
  p = Math.min(Math.max(percent, 0), 100)
  const x = p / 100 * view.clientWidth
  after.style.clipPath = "inset(0 0 0 " + (view.scrollLeft + x) + "px)"
  slider.style.left = x + "px"
  slider.style.height = view.clientHeight + "px"
  slider.setAttribute("aria-valuenow", Math.round(p))
}
function follow(event) {
  move(100 * (event.clientX - view.getBoundingClientRect().left) / view.clientWidth)
}
for (const part of [pair, slider]) {
  part.onpointerdown = event => {
    if (event.button || (part == pair && event.pointerType == "touch" && +zoom.value)) return
    part.setPointerCapture(held = event.pointerId)
    follow(event)
  }
  part.onpointermove = event => { if (event.pointerId == held) follow(event) }
  part.onpointerup = part.onpointercancel = () => {
    held = null
    slider.focus({ preventScroll: true })  // the keys go on from here
  }
}
slider.onkeydown = event => {
  if (!(event.key in KEYS) || event.altKey || event.ctrlKey || event.metaKey) return  // the browser's
  event.preventDefault()
  move(Math.round(p) + KEYS[event.key] * (event.shiftKey ? 10 : 1))
}
function resize() {  // to pixels of the screen; the middle of the view stays where it is
  const x = (view.scrollLeft + view.clientWidth / 2) / view.scrollWidth
  const y = (view.scrollTop + view.clientHeight / 2) / view.scrollHeight
  view.classList.toggle("zoomed", +zoom.value)
  pair.style.width = +zoom.value ? zoom.value * $width / devicePixelRatio + "px" : ""
  view.scrollTo(x * view.scrollWidth - view.clientWidth / 2, y * view.scrollHeight - view.clientHeight / 2)
  move(p)
}
zoom.onchange = window.onresize = resize
view.onscroll = () => move(p)
resize()  // a reloaded page may keep its choice of zoom
</script>
""")


@dataclass
class Config:
    labels: str = ""  # captions, separated by commas; default: the file names
    box: tuple = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom of the part to show, as shares of the sides
    height: int = 0  # height of the strip in pixels; 0: as large as the largest picture
    out: str = "compare"  # name without ending, or a folder (also -o)
    inputs: tuple = ()  # two or more pictures


def load(paths, box):
    """Pictures of one size, cut to the box; upright, alpha on white, 16 bits as 8."""
    pictures = [to_pillow(read_image(path)) for path in paths]
    size = max(p.size for p in pictures)
    left, top, right, bottom = corners = [round(share * size[i % 2]) for i, share in enumerate(box)]
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        die(f"--box wants left,top,right,bottom from 0 to 1, got {','.join(map(str, box))}")
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
    if cfg.height < 0:
        die(f"--height wants 1 or more pixels, or 0 for as large as the pictures, got {cfg.height}")
    folder = cfg.out.endswith("/") or Path(cfg.out).is_dir()
    out = Path(cfg.out, "compare") if folder else Path(re.sub(r"\.(png|html)$", "", cfg.out))
    png, html = Path(f"{out}.png"), Path(f"{out}.html")
    if png.resolve() in [Path(name).resolve() for name in cfg.inputs]:
        die(f"{png} is one of the pictures; name another output with -o")
    pictures = load(cfg.inputs, cfg.box)
    left, right = map(escape, labels[:2])
    width, height = pictures[0].size
    page = PAGE.substitute(left=left, right=right, width=width, height=height,
                           a=embedded(pictures[0]), b=embedded(pictures[1]))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        strip(pictures, labels, cfg.height).save(png)
        html.write_text(page, encoding="utf-8")
    except OSError as reason:
        die(reason)
    print(f"wrote {png} and {html}")


if __name__ == "__main__":
    launch(main)
