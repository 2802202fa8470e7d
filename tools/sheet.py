"""What training will see of a source: a row per sample, HR | LR as the network gets it | what was drawn.

    python data.py show photos/                         # contact_sheet.png; the same as tools/sheet.py
    python data.py show procedural --degradation mild   # pictures that need no download, milder
    python data.py show hr_and_lr/                      # pairs: HR | LR of the folder
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, die, launch
from data import Crops, degrade, describe, draw_batch, font, keyed_generator, open_source, to_pillow


@dataclass
class Config:
    out: str = "contact_sheet.png"  # the picture that is written
    rows: int = 8  # samples on it
    resolution: int = 128  # side of the HR crop in pixels
    degradation: str = "full+mild"  # full, mild, or full+mild: half of each, as tiny is trained
    per_batch: bool = False  # most of it drawn once for all rows, as the official loader does
    seed: int = 0  # same seed, same sheet
    inputs: tuple = ()  # show SOURCE


def sheet(source, cfg):
    """The picture. ValueError where too few pictures can be read."""
    crops, key = Crops(source, cfg.resolution, cfg.seed), ("show", cfg.seed)
    hr, lr, paired = default_collate([crops[row] for row in range(cfg.rows)])
    options = dict(kind=cfg.degradation, per_batch=cfg.per_batch)
    made = degrade(hr / 255, keyed_generator("cpu", *key), **options)
    drawn = draw_batch(*hr[:, 0].shape, keyed_generator("cpu", *key), **options)  # the same again
    side = max(cfg.resolution, 256)
    page = Image.new("RGB", (2 * side + 560, cfg.rows * (side + 4)), "white")
    for row, top in enumerate(range(0, page.height, side + 4)):
        lines = {"LR": "a picture of its own"} if paired[row] else drawn[row]
        for left, image in ((0, hr[row] / 255), (side + 4, lr[row] / 255 if paired[row] else made[row])):
            page.paste(to_pillow(image).resize((side, side), Image.Resampling.NEAREST), (left, top))
        text = re.sub(r"(\.\d\d)\d+|[{}']", r"\1", "\n".join(f"{k}: {v}" for k, v in lines.items()))
        ImageDraw.Draw(page).text((2 * side + 16, top), text, "black", font(13))
    return page


def main():
    cfg = cli(Config)
    if len(cfg.inputs) != 2 or cfg.inputs[0] != "show" or cfg.rows < 1:
        die("usage: python data.py show SOURCE; SOURCE is a folder, a list file, a tar or procedural")
    try:
        source = open_source(cfg.inputs[1])
        source.limit = 1.0  # a look at the data stops for no bad file
        print(describe(source))
        sheet(source, cfg).save(cfg.out)
    except (ValueError, OSError) as reason:
        die(reason)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    launch(main)
