"""Our scores beside those of the paper, runs beside runs, and guidance against fidelity.

    python tools/tables.py paper                              # the paper's own tables, from assets/paper.json
    python tools/tables.py paper out/eval --row VOSR-0.5B-os  # folders of evaluate.py beside Table 1
    python tools/tables.py compare teacher=out/t-1,out/t-2 rc=out/rc-1,out/rc-2     # as Tables 3, 6 and 7
    python tools/tables.py sweep --data REALSR --protocol realsr --scales=-0.5,0,0.5,1 --steps 10 -o out/sweep
    python tools/tables.py gt REALSR/HR --row RealSR          # as Table 4

compare: folders of a name are seeds; differences are paired by picture and, in the order given, by seed.
sweep, as Fig. 4: evaluate.py, whose options it takes, into OUT/s_-0.5 and so on, then OUT/sweep.csv and .png.
"""
import math
import os
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from config import cli, die, launch, validate
from data import font, open_source, write_whole
from evaluate import METRICS
from model import read_json
from tools.curves import COLOURS, SHAPES, WIDTH, spread

PAPER = read_json(Path(__file__).parent.with_name("assets") / "paper.json")


@dataclass
class Config(evaluate.Config):
    out: str = "out/sweep"  # sweep: folder of the results (also -o)
    scales: str = "-0.5,0,0.5,1,1.5"  # sweep: the values of --cfg_scale
    metrics: str = "psnr_y,ssim_y,niqe,coherence,spec_hi"  # compare, sweep: columns of per_image.csv
    row: str = ""  # paper: row of Table 1, by default that of model and steps; gt: row of Table 4
    set: str = ""  # paper: lsdir, realsr, screensr; by default that of the protocol, lsdir for folder
    inputs: tuple = ()  # paper, compare, sweep or gt; then folders, or NAME=FOLDER,FOLDER


def table(*rows):
    """Print markdown; the first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    print(lines[0], "|" + "---|" * len(rows[0]), *lines[1:], "", sep="\n")


def towards(name):
    return f"{name}, {METRICS[name][0] if name in METRICS else PAPER['better'][name]} is better"


def chosen(cfg, least, most):
    """The columns of --metrics."""
    names = [*dict.fromkeys(cfg.metrics.split(","))]
    if not least <= len(names) <= most or not METRICS.keys() >= {*names}:
        die(f"--metrics wants {least} to {most} of {','.join(METRICS)}; got {cfg.metrics!r}")
    return names


def lookup(part, name, kind):
    names = ", ".join(part)
    return part[name] if name in part else die(f"the paper has no {kind} {name!r}; --{kind} takes: {names}")


def beside(ours, columns, theirs, name):
    """Table of our means, {column: float}, and a row of the paper."""
    rows = [("metric", "ours", f"paper, {name}", "ours - paper")]
    for metric, number in zip(columns, theirs, strict=True):
        own = ours.get(metric)
        cells = ("not measured", "") if own is None else (f"{own:.4f}", f"{own - number:+.4f}")
        rows.append((towards(metric), cells[0], f"{number:.4f}", cells[1]))
    table(*rows)


# ---------------------------------------------------------------- paper
def paper(cfg, folders):
    """Table 1 beside evaluated folders; without any, all that assets/paper.json holds."""
    for number in "" if folders else "123467":
        part = PAPER[f"table{number}"]
        for note, rows in (part["rows"] if number == "1" else {part["note"]: part["rows"]}).items():
            print(f"Table {number}, {note} ({PAPER['source']})\n")
            table(("", *part["columns"]), *((name, *numbers) for name, numbers in rows.items()))
    for folder in folders:
        summary = read_json(path) if (path := Path(folder, "summary.json")).is_file() else {}
        if not summary.keys() >= {"protocol", "count", "settings", "means"}:
            die(f"{folder} is not a result of evaluate.py: no summary.json with settings and means is in it")
        settings, group = summary["settings"], cfg.set or summary["protocol"].replace("folder", "lsdir")
        model, steps = settings["model"], settings["steps"]
        told = model.endswith(("-ms", "-os", "/"))                              # the slash: finished pictures
        name = cfg.row or f"VOSR-{model}{'' if told else '-os' if steps <= 4 else '-ms'}"
        theirs = lookup(lookup(PAPER["table1"]["rows"], group, "set"), name, "row")
        used = [f", {key} {settings[key]}" for key in ("steps", "cfg_scale", "color")
                if "" not in (steps, settings[key])]
        print(f"{folder}: {summary['protocol']}, {summary['count']} pictures, {model}", *used, "\n", sep="")
        beside(summary["means"][model], PAPER["table1"]["columns"], theirs, name)
        print(f"Paper: {PAPER['sets'][group]}.\n")


# ---------------------------------------------------------------- compare
def read_runs(folders):
    """Folders of evaluate.py -> per folder {stem: {column: float}}, of the pictures that all of them have."""
    paths = [Path(folder, "per_image.csv") for folder in folders]
    if other := [path.parent for path in paths if not path.is_file()]:
        die(f"{other[0]} is not a result of evaluate.py: it has no per_image.csv")
    runs = [evaluate.read_scores(path) for path in paths]
    if not (stems := sorted(set.intersection(*map(set, runs)))):
        die(f"no picture is in all of {', '.join(folders)}: evaluate them on the same --data")
    if left := len(set.union(*map(set, runs))) - len(stems):
        print(f"warning: {left} pictures are left out, they are not in all folders", file=sys.stderr)
    return [{stem: run[stem] for stem in stems} for run in runs]


def column(runs, metric):
    """Scores (runs, pictures), of the pictures for which all runs have one."""
    values = np.array([[scores.get(metric, math.nan) for scores in run.values()] for run in runs])
    values = values[:, ~np.isnan(values).any(0)]
    return values if values.size else die(f"no picture has {metric} in all folders; --metrics without it")


def compare(cfg, words):
    metrics, pairs = chosen(cfg, 1, len(METRICS)), [word.partition("=")[::2] for word in words]
    groups = {name: folders.split(",") for name, folders in pairs}
    if not len(words) == len(groups) > 1 or len({*map(len, groups.values())}) > 1 or "" in sum(pairs, ()):
        die("compare wants two or more names, each once and with as many folders: teacher=out/t-1,out/t-2 "
            f"rc=out/rc-1,out/rc-2; got {' '.join(words) or 'none'}")
    (first, *others), (count,) = groups, {*map(len, groups.values())}
    runs = read_runs([folder for folders in groups.values() for folder in folders])
    values = {metric: column(runs, metric).reshape(len(groups), count, -1) for metric in metrics}
    table(("", "runs", *map(towards, metrics)),
          *((name, count, *(spread(values[metric][g].mean(1)) for metric in metrics))
            for g, name in enumerate(groups)))
    rows = [("difference", "metric", "mean", "95 % interval", "runs", "pictures")]
    for g, name in enumerate(others, start=1):
        for metric in metrics:
            d = values[metric][g] - values[metric][0]                           # (runs, pictures)
            mean, low, high = evaluate.bootstrap(d.mean(0))
            sides = ["below" if x < 0 else "above" if x > 0 else "equal" for x in d.mean(1)]
            side, star = max(sides, key=sides.count), "" if low <= 0 <= high else " *"
            rows.append((f"{name} - {first}", towards(metric), f"{mean:+.4f}{star}",
                         f"[{low:+.4f}, {high:+.4f}]", f"{sides.count(side)} of {count} {side}", d.shape[1]))
    table(*rows)
    print("±: deviation over runs. Intervals: over pictures, of the mean of the runs; *: 0 is not in it")


# ---------------------------------------------------------------- sweep
def ticks(low, high):
    """{number: its text}, two to seven round ones."""
    step, n = min((digit * 10.0**n, n) for n in range(-6, 7) for digit in (1, 2, 5)
                  if high - low < 7 * digit * 10.0**n)
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return {k * step: f"{k * step:.{max(0, -n)}f}" for k in numbers}


def draw_panel(pen, left, top, width, height, title, x, y):
    """A plot. x (n,); y (n, 3): mean, low and high end of its interval."""
    margin, pad = max(0.08 * np.ptp(y), 5e-4), 0.05 * np.ptp(x) or 0.1
    low, high, start, end = y.min() - margin, y.max() + margin, x[0] - pad, x[-1] + pad

    def place(x, y):
        return left + (x - start) / (end - start) * width, top + (high - y) / (high - low) * height

    lines = [(place(start, at), place(end, at), text, -24, 0, "rm") for at, text in ticks(low, high).items()]
    lines += [(place(at, low), place(at, high), text, 0, 24, "ma") for at, text in ticks(start, end).items()]
    for (x0, y0), far, text, right, down, anchor in lines:
        pen.line((x0, y0, *far), "#ddd", 4)
        pen.text((x0 + right, y0 + down), text, "#333", font(52), anchor)
    line, *edges = ([*map(place, x, ends)] for ends in y.T)
    pen.polygon(edges[0] + edges[1][::-1], COLOURS[0] + "38")
    pen.line(line, COLOURS[0], 8, "curve")
    for point in line:
        pen.regular_polygon((*point, 18), *SHAPES[0], COLOURS[0])
    pen.rectangle((left, top, left + width, top + height), None, "#888", 4)
    pen.text((left, top - 32), title, "black", font(56), "ls")
    pen.text((left + width / 2, top + height + 104), "guidance s", "#333", font(52), "ma")


def draw(title, scales, points):
    """The picture: a panel per metric, up to three in a row. points: {metric: (scales, 3)}."""
    across = 2 if len(points) in (2, 4) else 3
    wide, tall = WIDTH // across, 1180
    page = Image.new("RGB", (WIDTH, 140 + math.ceil(len(points) / across) * tall), "white")
    (pen := ImageDraw.Draw(page, "RGBA")).text((56, 84), title, "black", font(60), "lm")
    for n, (metric, y) in enumerate(points.items()):
        draw_panel(pen, n % across * wide + 240, n // across * tall + 260, wide - 300, tall - 320,
                   towards(metric), np.array(scales), y)
    return page.reduce(2)


def sweep(cfg, words):
    metrics, out = chosen(cfg, 2, 5), Path(cfg.out)
    if not re.fullmatch(r"-?[\d.]+(,-?[\d.]+)+", cfg.scales):
        die(f"--scales wants two or more numbers like -0.5,0,0.5; got {cfg.scales!r}")
    scales = sorted({float(word) + 0.0 for word in cfg.scales.split(",")})      # -0 becomes 0
    if words or cfg.from_ or cfg.against or not math.isnan(cfg.cfg_scale) or "RANK" in os.environ:
        die("sweep takes options alone, without --cfg_scale (see --scales), --from, --against and torchrun")
    given = {field.name: getattr(cfg, field.name) for field in fields(evaluate.Config)}
    runs = [evaluate.Config(**given | dict(cfg_scale=s, out=str(out / f"s_{s:g}"))) for s in scales]
    if evaluate.prepare(runs[0])[3].one_step:
        die(f"--model {cfg.model} --steps {cfg.steps} is one-step and has no guidance; try --steps 10")
    for run in runs:
        with redirect_stdout(sys.stderr):                                       # stdout is for the table
            print(f"s = {run.cfg_scale:g}")
            summary = evaluate.evaluate(run)
        sys.stderr.writelines(f"warning: {failed}\n" for failed in summary["failed"])
    scores = read_runs([run.out for run in runs])
    points = {name: np.array([evaluate.bootstrap(d) for d in column(scores, name)]) for name in metrics}
    rows = [["cfg_scale", *(name + end for name in metrics for end in ("", "_low", "_high"))]]
    rows += [[f"{s:g}", *(f"{x:.6f}" for y in points.values() for x in y[i])] for i, s in enumerate(scales)]
    write_whole(out / "sweep.csv", lambda path: path.write_text("".join(",".join(r) + "\n" for r in rows)))
    steps, count = summary["settings"]["steps"], len(scores[0])
    title = f"{cfg.model}, {steps} steps, {Path(cfg.data).name}, {count} pictures; band: 95 % interval"
    write_whole(out / "sweep.png", lambda path: draw(title, scales, points).save(path, "PNG"))
    cells = ([f"{s:g}", *("{:.4f} [{:.4f}, {:.4f}]".format(*y[i]) for y in points.values())]
             for i, s in enumerate(scales))
    table(("s", *map(towards, metrics)), *cells)
    print(f"{title}\nwrote {out / 'sweep.csv'} and {out / 'sweep.png'}")


def gt(cfg, places):
    """NIQE of ground truth, beside Table 4."""
    part, natural = PAPER["table4"], evaluate.read_natural(cfg.metric_weights)
    theirs = lookup(part["rows"], cfg.row, "row") if cfg.row else ()
    for place in places or die("gt wants folders or lists of pictures: python tools/tables.py gt REALSR/HR"):
        source = open_source(place)
        if source.partners or source.count != len(source.names):
            die(f"{place} holds tars or pairs; a folder or a list of pictures works, such as {place}/HR")
        names = tqdm(source.names[:cfg.limit or None], unit="picture", disable=None)
        scores = [evaluate.niqe(evaluate.read_pixels(name), natural) for name in names]
        usable = [score for score in scores if not math.isnan(score)]
        if not usable:
            die(f"{place}: none of {len(names)} pictures has the detail and the 96x192 px that NIQE needs")
        print(f"{place}: niqe {np.mean(usable):.4f}, mean of {len(usable)} pictures\n")
        if cfg.row:
            beside({"niqe": np.mean(usable)}, part["columns"], theirs, cfg.row)


def main():
    cfg = cli(Config)
    validate(cfg, limit=0)
    (word, *rest), commands = cfg.inputs or ("",), {f.__name__: f for f in (paper, compare, sweep, gt)}
    if word not in commands:
        die(f"say {', '.join(commands)} first, as in python tools/tables.py paper out/eval; got {word!r}")
    commands[word](cfg, rest)


if __name__ == "__main__":
    launch(main)
