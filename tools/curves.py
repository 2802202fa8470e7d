"""Learning curves of runs of train.py and distill.py in one picture, and their numbers as a table.

    python tools/curves.py out/ablation/* -o curves.png

Folders whose names differ only in a trailing -NUMBER are one group, such as a training with several seeds:
a line is the mean of its runs as far as all have got (longer ones go on as thin lines), a band reaches from
the lowest to the highest. Panels: training loss; `val`, if it was logged; loss by t, last tenth of the log.
The training loss of a log line is that of all its steps, the mean of loss_t0 to loss_t3, as t is uniform;
without them it is `loss`, that of one batch. The first fiftieth of the steps may leave the panel at the top.
"""
import json
import math
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, die, launch
from data import font, write_whole
from model import OFFICIAL, DiT, TinySemanticEncoder, build, read_config, read_json

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito, 2008
SHAPES = ((60, 0), (4, 0), (3, 0), (4, 45), (3, 180), (5, 0), (6, 0))  # of markers: corners, turned by
WIDTH = 3600  # of the drawing; the picture has half of that, for pages that show it at a quarter
QUARTERS = tuple(f"loss_t{n}" for n in range(4))
UNTOLD = {*OFFICIAL.values(), "seed", "out", "export", "device"}  # settings that do not tell groups apart


@dataclass
class Config:
    window: int = 0  # steps over which the training loss is averaged; 0: a fifteenth of the longest run
    out: str = "curves.png"  # the picture that is written (also -o)
    inputs: tuple = ()  # run folders


# ---------------------------------------------------------------- logs
def read(folder):
    """args.json and the rows of log.jsonl, without a half-written last line, as train.py reads them."""
    if not (log := folder / "log.jsonl").is_file():
        die(f"{folder} has no log.jsonl: it is not a run folder of train.py or distill.py")
    rows, bad = [], {}
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            row = {name: float(value) for name, value in json.loads(line).items()}
            step, _ = f"{row['step']:.0f}", row["loss"]
        except (ValueError, KeyError, TypeError, AttributeError):
            die(f"{log}: line {len(rows) + 1} is no log line: {line[:60]}")
        for name in [name for name in ("loss", "val", *QUARTERS) if not 0 < row.get(name, 1.0) < math.inf]:
            bad.setdefault(name, []).append(step)
            del row[name]
        if "loss" in row:
            row["train"] = np.mean([row[n] for n in QUARTERS]) if row.keys() >= {*QUARTERS} else row["loss"]
        rows.append(row)
    for name, at in bad.items():
        print(f"warning: {log}: {name} is no positive number at step {', '.join(at)}", file=sys.stderr)
    return read_json(folder / "args.json"), rows


def grouped(folders):
    """{name: folders of the group}. A NUMBER without sisters belongs to the name: 0.5B-512 is no seed."""
    groups = {}
    for folder in folders:
        groups.setdefault(re.sub(r"-\d+$", "-*", str(folder)), []).append(folder)
    paths = [Path(key) if runs[1:] else runs[0] for key, runs in groups.items()]
    names = [path.name.removesuffix("-*") for path in paths]
    return {name if names.count(name) == 1 else str(path): runs
            for name, path, runs in zip(names, paths, groups.values(), strict=True)}


def points(rows, name):
    """{step: value} where the log has one."""
    return {row["step"]: row[name] for row in rows if name in row}


def last_tenth(rows, name):
    values = [*points(rows, name).values()]
    return np.mean(values[-math.ceil(len(values) / 10):])


def by_t(rows):
    """{middle of a quarter of t: its loss over the last tenth of the log}."""
    return {n / 4 + 0.125: last_tenth(rows, name) for n, name in enumerate(QUARTERS) if points(rows, name)}


def smooth(rows, window):
    """{step: mean training loss of the steps up to half a window away}; near the first they are fewer."""
    x, y = np.array([*points(rows, "train").items()]).T
    steps, half = np.diff(x, prepend=0), np.minimum(window / 2, x - x[0])  # a row stands for its steps
    first, after = np.searchsorted(x, x - half), np.searchsorted(x, x + half, "right")
    total, count = np.cumsum([0, *steps * y]), np.cumsum([0, *steps])
    return dict(zip(x.tolist(), (total[after] - total[first]) / (count[after] - count[first]), strict=True))


def common(curves):
    """Curves {x: y} of a group -> the x (n,) that all have, and y (curves, n)."""
    x = sorted(set.intersection(*map(set, curves)))
    return np.array(x), np.array([[curve[at] for at in x] for curve in curves])


# ---------------------------------------------------------------- words and numbers
def parameters(args):
    """Their number as train.py counts them, or the name of a stage whose size args.json does not tell."""
    if args.get("method") in ("autoencoder", "decoder"):
        return args["method"]
    cfg = read_config(args, "args.json")
    learned = cfg.ae_type == "tiny" and cfg.semantics
    nets = [DiT(cfg), *([TinySemanticEncoder(cfg.enc_dim)] if learned else [])]
    return f"{sum(p.numel() for net in nets for p in net.parameters()) / 1e6:.2f} M parameters"


def describe(groups):
    """Words that hold for every group, and for each its name with those that do not (up to 3 settings)."""
    stored = {name: [args for args, _ in runs] for name, runs in groups.items()}
    every = [args for runs in stored.values() for args in runs]
    keys = [key for key in every[0] if key not in UNTOLD and all(key in args for args in every)]
    for name, runs in stored.items():
        if mixed := [key for key in keys if any(args[key] != runs[0][key] for args in runs)]:
            print(f"warning: the runs of {name} differ in {', '.join(mixed)}", file=sys.stderr)
    told = [key for key in keys if any(runs[0][key] != every[0][key] for runs in stored.values())][:3]
    rows = [[f"{len(runs)} seed{'s' * (len(runs) > 1)}", build(partial(parameters, runs[0]), name),
             *(f"{key} {runs[0][key]}".translate({91: "", 93: ""})[:40] for key in told)]
            for name, runs in stored.items()]
    shared = [column[0] for column in zip(*rows, strict=True) if len({*column}) == 1]
    own = [", ".join(word for word in row if word not in shared) for row in rows]
    return ", ".join(shared), [f"{name}   {words}" for name, words in zip(stored, own, strict=True)]


def spread(values):
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def table(groups):
    """Lines of markdown; val is that of the last step at which all runs of the group have one."""
    yield "| group | runs | steps | training loss, last 10 % of the log | val at the end | images/s, median |"
    yield "|---|---|---|---|---|---|"
    for name, runs in groups.items():
        ends, planned = [rows[-1]["step"] for _, rows in runs], runs[0][0].get("max_train_steps", "?")
        steps = " to ".join(f"{end:.0f}" for end in sorted({min(ends), max(ends)}))
        at, y = common([points(rows, "val") for _, rows in runs])
        val = spread(y[:, -1]) + (f" (step {at[-1]:.0f})" if at[-1] < max(ends) else "") if len(at) else ""
        loss = spread([last_tenth(rows, "train") for _, rows in runs])
        speed = np.median([row.get("images_per_s", math.nan) for _, rows in runs for row in rows])
        yield f"| {name} | {len(runs)} | {steps} of {planned} | {loss} | {val} | {speed:.1f} |"


# ---------------------------------------------------------------- the picture
def log_ticks(low, high, gap):
    """As many round numbers from low to high as there are with logarithms at least gap apart."""
    decades = [10.0**n for n in range(-6, 5)]
    sets = [[step * n for n in range(max(1, math.ceil(low / step)), math.floor(high / step) + 1)]
            for decade in decades for step in (decade, 2 * decade, 5 * decade) if high < 1000 * step]
    sets += [[x for decade in decades for digit in digits if low <= (x := digit * decade) <= high]
             for digits in ((1,), (1, 2, 5), (1, 2, 3, 5, 7))]
    return max((x for x in sets if all(b / a >= math.exp(gap) for a, b in pairwise(x))), key=len)


def draw_panel(page, left, top, width, title, axis, right, ticks, curves, height=1080):
    """A plot on the page, x from 0 to right. curves: per group a list of {x: y}; few points are marked."""
    end = max(x for runs in curves for curve in runs for x in curve)
    seen = [math.log(y) for runs in curves for curve in runs for x, y in curve.items() if x >= end / 50]
    margin = max(0.04 * (max(seen) - min(seen)), 0.005)
    low, high = min(seen) - margin, max(seen) + margin
    inside = Image.new("RGB", (width, height), "white")  # cuts off what reaches beyond
    pen, outer = ImageDraw.Draw(inside, "RGBA"), ImageDraw.Draw(page)

    def place(x, y):
        x, y = np.atleast_1d(x) / right * width, (high - np.log(np.atleast_1d(y))) / (high - low) * height
        return [*zip(x.tolist(), y.tolist(), strict=True)]

    for y in log_ticks(math.exp(low), math.exp(high), 104 / height * (high - low)):
        _, (_, at) = line = place([0, right], [y, y])
        pen.line(line, "#ddd", 4)
        outer.text((left - 24, top + at), f"{y:.4g}", "#333", font(52), "rm")
    for x, text in ticks.items():
        _, (at, _) = line = place([x, x], np.exp([low, high]))
        pen.line(line, "#e8e8e8", 4)
        outer.text((left + at, top + height + 24), text, "#333", font(52), "ma")
    means = [common(runs) for runs in curves]
    for (x, y), colour in zip(means, COLOURS[:len(means)], strict=True):
        if min(y.shape) > 1:
            pen.polygon(place(x, y.max(0)) + place(x, y.min(0))[::-1], colour + "38")
    for index, ((x, y), runs) in enumerate(zip(means, curves, strict=True)):
        for curve in runs:  # beyond what all runs have
            if rest := [at for at in curve if at >= max(x, default=0)]:
                pen.line(place(rest, [curve[at] for at in rest]), COLOURS[index] + "a0", 4)
        if line := place(x, y.mean(0)):
            pen.line(line, COLOURS[index], 8, "curve")
        for point in line if len(line) < 20 else ():
            pen.regular_polygon((*point, 18), *SHAPES[index], COLOURS[index])
    page.paste(inside, (left, top))
    outer.rectangle((left, top, left + width, top + height), None, "#888", 4)
    outer.text((left, top - 32), title, "black", font(56), "ls")
    outer.text((left + width / 2, top + height + 104), axis, "#333", font(52), "ma")


def draw(groups, window, end):
    """The picture: what holds for all runs, the legend, and up to three panels; window and end in steps."""
    page = Image.new("RGB", (WIDTH, 4000), "white")
    (shared, legend), pen, x, y = describe(groups), ImageDraw.Draw(page), 56, 180
    pen.text((x, 84), shared, "black", font(60), "lm")
    if any(len(runs) > 1 for runs in groups.values()):
        pen.text((WIDTH - 64, 84), "line: mean, band: lowest to highest of the seeds", "#555", font(52), "rm")
    for index, text in enumerate(legend):
        wide = 176 + font(56).getlength(text)
        x, y = (56, y + 88) if 56 < x > WIDTH - wide else (x, y)
        pen.line((x, y, x + 144, y), COLOURS[index], 12)
        pen.regular_polygon((x + 72, y, 24), *SHAPES[index], COLOURS[index])
        pen.text((x + 176, y), text, "black", font(56), "lm")
        x += wide + 96
    step = min(digit * 10**n for n in range(12) for digit in (1, 2, 5) if end < 5 * digit * 10**n)
    labels = {x: f"{x / 1000:g}K" if x >= 10_000 else str(x) for x in range(0, int(end) + 1, step)}
    steps = ("step", 1.03 * end, labels)
    quarters = ("t (1 = noise)", 1, {0: "0", 0.25: "1/4", 0.5: "1/2", 0.75: "3/4", 1: "1"})
    panels = ((f"training loss, mean of {window} steps", *steps, partial(smooth, window=window)),
              ("held-out loss", *steps, partial(points, name="val")),
              ("training loss at the end, by t", *quarters, by_t))
    panels = [(*words, curves) for *words, make in panels
              if any(map(any, curves := [[make(rows) for _, rows in runs] for runs in groups.values()]))]
    for n, panel in enumerate(panels):
        draw_panel(page, n * WIDTH // len(panels) + 184, y + 180, WIDTH // len(panels) - 248, *panel)
    return page.crop((0, 0, WIDTH, y + 1460)).reduce(2)


def main():
    cfg = cli(Config)
    if not cfg.inputs or cfg.window < 0:
        die("usage: python tools/curves.py RUN_FOLDER ... -o curves.png; --window is a number of steps")
    runs = {folder: read(folder) for folder in map(Path, cfg.inputs)}
    for folder in [folder for folder, (_, rows) in runs.items() if not points(rows, "train")]:
        print(f"warning: {folder} has no loss in its log yet; left out", file=sys.stderr)
        del runs[folder]
    groups = {name: [runs[folder] for folder in folders] for name, folders in grouped(runs).items()}
    if not 0 < len(groups) <= len(COLOURS):
        die(f"{len(groups)} groups of runs to draw; 1 to {len(COLOURS)} can be told apart")
    print(*table(groups), sep="\n")
    longest = max(rows[-1]["step"] for runs in groups.values() for _, rows in runs)
    page = draw(groups, cfg.window or max(1, round(longest / 15)), longest)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(cfg.out, lambda path: page.save(path, "PNG"))
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    launch(main)
