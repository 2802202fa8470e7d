"""Choose the good pictures of a collection and pack them into tar shards for training.

    python tools/pack.py SOURCE OUT           # a folder, a list file, a tar or a folder of tars
    python tools/pack.py SOURCE OUT --look    # no shards yet: pack.csv and pack.png show what would be kept
    torchrun --nnodes=10 --nproc_per_node=1 tools/pack.py SOURCE OUT        # ten machines that share a disk
    python train.py --data OUT

The paper filters web pictures by gradient, entropy and resolution, removes duplicates, balances categories,
and is left with about 100M (Sec. 4.1); it does not say how. Here a picture is left out that cannot be read,
is small, flat (weak gradients), blurred or enlarged (gradients without fine detail), has few grey levels, or
looks like a larger one. --per_cluster limits the pictures of a similar look, such as blue-bright-plain, which
stands in for the balance of categories and needs no network.

First the pictures are measured, block by block, into OUT/measures; from these files each process makes the
same decisions; then it writes its share of the shards, with the original bytes. Finished files are kept: the
same command goes on where it was stopped, and the shards are the same for any number of processes.
"""
import csv
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from config import cli, die, launch

COLUMNS = ("key", "name", "type", "bytes", "width", "height", "gradient", "sharpness", "entropy", "hash",
           "cluster", "verdict")
VERDICTS = ("kept", "unreadable", "small", "flat", "blurred", "few levels", "duplicate", "cluster full")
COLOURS = ("red", "orange", "lime", "green", "cyan", "blue", "purple", "pink")  # 45 degrees of hue each
LOW = sorted(np.ndindex(11, 11), key=lambda uv: (sum(uv), uv))[1:65]  # lowest frequencies without the mean
COSINES = np.cos(math.pi / 32 * np.arange(11)[:, None] * (np.arange(32) + 0.5))  # (11, 32), rows of a DCT


@dataclass
class Config:
    side: int = 256  # shortest side in pixels
    gradient: float = 4.0  # least RMS gradient where the picture is sharpest, in levels of 255 per pixel
    sharpness: float = 0.32  # least ratio of that to the gradient at a quarter of the size; 0.25 is blurred
    entropy: float = 1.8  # least entropy of the grey levels in bits; line art has less, a starry sky more
    distance: int = 6  # bits of 64 in which hashes of duplicates may differ; -1: keep duplicates
    per_cluster: int = 0  # pictures of a similar look at most; 0: all
    shard: int = 1000  # pictures per shard
    look: bool = False  # stop before the shards; until there are some, other thresholds may follow
    workers: int = 0  # processes; 0: one per core
    patience: int = 900  # seconds that other ranks may go without finishing a file
    inputs: tuple = ()  # SOURCE OUT


# ---------------------------------------------------------------- a picture in numbers
def content(source, k):
    """Name of picture k and its bytes, none if it is missing or too large. Raises OSError."""
    path, n = source.path(k)
    members = data.shard_members(path) if path.endswith(".tar") else [("", 0, os.path.getsize(path))]
    name, start, size = members[n] if n < len(members) else (str(n), 0, 0)
    with open(path, "rb") as file:
        file.seek(start)
        return f"{path}/{name}" if name else path, file.read(size) if size <= data.MAX_BYTES else b""


def energy(x):
    """Mean squared gradient of pictures (B, n, n) -> (B,)."""
    steps = np.diff(x, axis=1)[:, :, :-1], np.diff(x, axis=2)[:, :-1]
    return sum(np.einsum("bij,bij->b", d, d) for d in steps) / (x.shape[1] - 1) ** 2


def measure(rgb):
    """RGB picture of any size -> gradient, sharpness, entropy, hash, cluster, as text.

    Gradients are taken at full size, where training cuts its crops, in 64 windows all over the picture. The
    strongest 16 count, so the background may be out of focus. Sharpness is their ratio to gradients after
    averaging 4 x 4 pixels, where a smooth slope is 4 times as steep and grain is weaker: 0.25 for a blurred
    picture, 0.5 to 0.7 for clean edges, more for texture, at any contrast. The rest comes from a copy of 256
    to 511 px. The hash has a bit per frequency: whether it is above the median.
    """
    rgb = rgb.resize([max(n, 8) for n in rgb.size]) if min(rgb.size) < 8 else rgb
    grey = np.asarray(rgb.convert("L"))
    n = min(64, *grey.shape) // 4 * 4  # side of a window
    top, left = (np.linspace(0, length - n, 8).astype(int) for length in grey.shape)
    windows = sliding_window_view(grey, (n, n))[top[:, None], left].reshape(64, n, n).astype(np.float32)
    quarter = windows.reshape(64, n // 4, 4, n).mean(axis=2).reshape(64, n // 4, n // 4, 4).mean(axis=3)
    fine, coarse = energy(windows), energy(quarter)
    best = np.argsort(fine, kind="stable")[-16:]
    gradient, blunt = math.sqrt(fine[best].mean()), math.sqrt(coarse[best].mean())

    rgb = rgb.reduce(max(1, min(rgb.size) // 256))
    share = np.array([n for n in rgb.convert("L").histogram() if n]) / (rgb.width * rgb.height)
    entropy = (share * -np.log2(share)).sum()
    small = rgb.resize((32, 32), Image.Resampling.BOX)
    luma = np.asarray(small) @ np.array([0.299, 0.587, 0.114])
    waves = (COSINES @ luma @ COSINES.T)[tuple(np.transpose(LOW))]  # (64,)
    bits = np.packbits(waves > np.median(waves)).tobytes().hex()

    chroma = np.ptp(np.asarray(small), axis=2).ravel()  # levels between the strongest colour and the weakest
    hue = (np.asarray(small.convert("HSV"))[..., 0].ravel() / 32).round().astype(int) % 8
    busy = (fine > 8**2).mean()  # this and the brightness are cut into about thirds of photographs
    look = (COLOURS[np.bincount(hue, chroma).argmax()] if chroma.mean() > 16 else "grey",
            ("dark", "medium", "bright")[np.digitize(luma.mean(), (95, 140))],
            ("plain", "mixed", "busy")[np.digitize(busy, (0.6, 0.9))])
    return f"{gradient:.2f}", f"{gradient / max(blunt, 1e-6):.3f}", f"{entropy:.2f}", bits, "-".join(look)


def examine(source, k):
    """Row of picture k as in COLUMNS; the verdict is empty unless it cannot be read."""
    name, suffix = source.path(k)[0], ""
    try:
        name, body = content(source, k)
        if not body:
            raise ValueError(f"missing, empty, or more than {data.MAX_BYTES} bytes")
        picture = data.open_picture(name, content=body)  # as training will read it
        suffix, kind = Path(name).suffix.lower(), picture.format.lower()
        suffix = suffix if suffix in data.SUFFIXES else f".{kind}"
        if suffix not in data.SUFFIXES:
            raise ValueError(f"a {kind} file")
        rgb = data.on_white(*data.split_picture(picture)[:2])
        return k, name, suffix, len(body), *rgb.size, *measure(rgb), ""
    except (OSError, ValueError) as reason:
        reason = getattr(reason, "strerror", None) or str(reason).removeprefix(f"{name} ")
        reason = re.sub(r" <.*?>|\s+", " ", reason)  # no address of an object: same file, same row
        return k, name, suffix, *[""] * 8, f"unreadable: {reason}"


# ---------------------------------------------------------------- work that is shared
def write_rows(path, rows):
    def write(hidden):
        with open(hidden, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    data.write_whole(path, write)


def read_rows(paths):
    for path in paths:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield from csv.reader(file)


def measure_block(source, path, keys):
    """Measure these pictures into a file."""
    write_rows(path, [examine(source, k) for k in keys])


def pack_block(source, path, keys, suffixes, sizes):
    """Write these pictures as a shard. ValueError if one is not as it was."""
    def members():
        for k, suffix, size in zip(keys.tolist(), suffixes.tolist(), sizes.tolist(), strict=True):
            name, body = content(source, k)
            if len(body) != size:
                raise ValueError(f"{name} had {size} bytes when it was measured, now {len(body)}: begin anew")
            yield f"{k:09d}{suffix.decode()}", body
    data.write_shard(path, members())


def begin(source):
    """Start of a worker process."""
    def follow(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed

    global shared
    shared = source  # sent once per worker, not with each job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    warnings.simplefilter("ignore")  # Pillow's, about every odd tag
    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()


def timed(function, job):
    tick = time.perf_counter()
    function(shared, *job)
    return len(job[1]), time.perf_counter() - tick


def share_out(function, jobs, source, workers, **bar):
    """function(source, *job) for all jobs (path, keys, ...) whose file is missing -> pictures, seconds."""
    jobs, done = [job for job in jobs if not job[0].exists()], [(0, 0.0)]
    pool = ProcessPoolExecutor(workers, initializer=begin, initargs=(source,))
    try:
        with tqdm(total=sum(len(job[1]) for job in jobs), unit=" pictures", **bar) as progress:
            for future in as_completed([pool.submit(timed, function, job) for job in jobs]):
                done.append(future.result())
                progress.update(done[-1][0])
    except BrokenExecutor:
        raise ValueError("a worker was killed, perhaps for lack of memory; the same command goes on, "
                         "--workers N takes fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return map(sum, zip(*done, strict=True))


def wait(paths, patience):
    """Until these files of other ranks are there. ValueError if those seem to have stopped."""
    since = time.monotonic()
    while left := [path for path in paths if not path.exists()]:
        if len(left) < len(paths):
            paths, since = left, time.monotonic()
        if time.monotonic() - since > patience:
            raise ValueError(f"{left[0]} is missing, other ranks have finished nothing for {patience} s; the "
                             "same command goes on, --patience N waits longer")
        time.sleep(min(5, 0.2 + len(left) / 1000))


def claim(cfg, source, out, rank):
    """Note in OUT what it is made of. ValueError if something else is there, which says how it differs."""
    names = hashlib.sha256("\n".join(map(os.path.abspath, source.names)).encode(errors="surrogateescape"))
    mine = dict(source=os.path.abspath(source.spec), pictures=source.count, names=names.hexdigest()[:16])
    origin, note = tuple(mine), out / "pack.json"
    mine |= {k: v for k, v in asdict(cfg).items() if k not in ("look", "workers", "patience", "inputs")}
    wait([note] if rank else [], cfg.patience)
    old = json.loads(note.read_text()) if note.is_file() else {}
    fixed = mine if any(out.glob("[0-9]*.tar")) else origin
    differ = [f"{k} {old.get(k)} there, {mine[k]} now" for k in fixed if old.get(k) != mine[k]]
    if old and differ:
        raise ValueError(f"{out} holds something else: {'; '.join(differ)}; name a new folder")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not old and any(path for path in out.iterdir() if not path.name.startswith(".")):
            raise ValueError(f"{out} holds files that are not of this tool; name a new folder")
        data.write_whole(note, lambda hidden: hidden.write_text(json.dumps(mine, indent=1)))


# ---------------------------------------------------------------- decisions, the same on every rank
def duplicates(hashes, distance):
    """hashes (n,) uint64, best picture first -> (n,) index of the better one that is kept, or -1.

    Not all pairs are compared: of distance + 3 groups of bits at least 3 are equal in a pair that is so near,
    hence only pictures that agree in some 3 groups are. Were hashes even, one picture in 700 among 100M would
    have another within 6 bits by chance, one in 14 within 8.
    """
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    heads = np.sort(first)  # equal hashes take part once
    some, n, pairs = hashes[heads], len(heads), [np.empty(0, np.int64)]
    edges = [64 * i // (distance + 3) for i in range(distance + 4)]
    groups = [(1 << b) - (1 << a) for a, b in itertools.pairwise(edges)]
    for mask in map(sum, itertools.combinations(groups, 3)):
        part = some & np.uint64(mask)
        order, step, live = np.argsort(part, kind="stable"), 1, np.arange(n - 1)
        part = part[order]
        while len(live := live[: np.searchsorted(live, n - step)]):
            live = live[part[live] == part[live + step]]
            a, b = order[live], order[live + step]
            near = np.bitwise_count(some[a] ^ some[b]) <= distance
            pairs.append((np.maximum(a, b) * n + np.minimum(a, b))[near])
            step += 1
    better = np.arange(n)
    for b, a in zip(*np.divmod(np.unique(np.concatenate(pairs)), n), strict=True):
        if better[a] == a and better[b] == b:  # what is near only to a duplicate stays
            better[b] = a
    found = heads[better[np.searchsorted(heads, first[group])]]
    return np.where(found == np.arange(len(hashes)), -1, found)


def load(paths, count):
    """Measures of all pictures as an array (count,) with named fields; good: it could be read."""
    kinds = ("S5", "i8", "i4", "i4", "f8", "f8", "f8", "u8", "i4", "?")
    table, looks = np.zeros(count, list(zip((*COLUMNS[2:11], "good"), kinds, strict=True))), {}
    for k, (_, _, suffix, *numbers, bits, look, fault) in enumerate(read_rows(paths)):
        if not fault:
            table[k] = (suffix, *numbers, int(bits, 16), looks.setdefault(look, len(looks)), True)
    return table


def decide(cfg, table):
    """-> verdicts (n,), the first of VERDICTS that applies; key of the better picture (n,), or -1."""
    tests = [~table["good"], np.minimum(table["width"], table["height"]) < cfg.side]
    tests += [table[name] < getattr(cfg, name) for name in ("gradient", "sharpness", "entropy")]
    verdict, twin = np.select(tests, range(1, 6), 0).astype(np.int8), np.full(len(table), -1)
    if cfg.distance >= 0:
        rows = np.flatnonzero(verdict == 0)
        pixels = table["width"][rows].astype(np.int64) * table["height"][rows]
        rows = rows[np.lexsort((rows, -table["bytes"][rows], -pixels))]  # best first
        better = duplicates(table["hash"][rows], cfg.distance)
        twin[rows[better >= 0]] = rows[better[better >= 0]]
        verdict[twin >= 0] = VERDICTS.index("duplicate")
    for look in np.unique(table["cluster"][verdict == 0]) if cfg.per_cluster else ():
        rows = np.flatnonzero((verdict == 0) & (table["cluster"] == look))
        if len(rows) > cfg.per_cluster:  # those that stay are spread evenly over the source
            verdict[rows] = VERDICTS.index("cluster full")
            verdict[rows[np.arange(cfg.per_cluster) * len(rows) // cfg.per_cluster]] = 0
    return verdict, twin


# ---------------------------------------------------------------- what is shown
def draw(path, cfg, table, verdict):
    """Histograms of the measures: kept blue, left out by this threshold orange, for another reason grey."""
    sheet, bars, height = Image.new("RGB", (1200, 540), "white"), 90, 190
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    shades = np.array([(72, 120, 168), (224, 128, 48), (200, 200, 200), (255, 255, 255)], np.uint8)
    table, verdict = table[table["good"]], verdict[table["good"]]
    for n, name in enumerate(("side", "gradient", "sharpness", "entropy")):
        left, top, limit, out = 25 + n % 2 * 605, 40 + n // 2 * 270, getattr(cfg, name), verdict == n + 2
        values = np.append(np.minimum(table["width"], table["height"]) if n == 0 else table[name], limit)
        values = np.log2(np.maximum(values, max(limit / 8, 0.01)))  # what is lower is shown there
        low, high = values.min() - 0.01, values.max() + 0.01
        parts = [np.histogram(values[:-1][part], bars, (low, high))[0]
                 for part in (verdict == 0, out, (verdict != 0) & ~out)]
        tops = np.cumsum(parts, axis=0)[:, None] / max(1, sum(parts).max()) * height  # (3, 1, bars)
        panel = shades[(np.arange(height)[::-1, None] >= np.ceil(tops)).sum(axis=0)]  # (height, bars, 3)
        sheet.paste(Image.fromarray(panel).resize((6 * bars, height), Image.Resampling.NEAREST), (left, top))
        x = left + (values[-1] - low) / (high - low) * 6 * bars
        pen.line((x, top - 6, x, top + height), "red", 2)
        pen.text((left, top - 28), f"{name}: {out.sum()} of {len(out)} below {limit:g}", "black", font)
        for bar in range(0, bars + 1, bars // 5):
            label = f"{2 ** (low + bar / bars * (high - low)):.4g}"
            pen.text((left + 6 * bar, top + height + 5), label, "black", font, "ma")
    sheet.save(path)


def report(cfg, table, verdict, workers, measured, seconds):
    """Print what was kept, the speed of this run, and what 100M such pictures would take."""
    counts = np.bincount(verdict, minlength=len(VERDICTS))
    reasons = [f"{n} {name}" for name, n in zip(VERDICTS[1:], counts[1:], strict=True) if n]
    print(f"kept {counts[0]} of {len(table)}; left out: {', '.join(reasons) or 'none'} (pack.csv, pack.png)")
    if measured and counts[0]:
        hours, share = 1e8 / 3600 * seconds / measured, counts[0] / len(table)
        disk, shards = 1e-4 * share * table["bytes"][verdict == 0].mean(), 1e8 * share / cfg.shard
        print(f"measured {measured} at {measured / seconds:.1f} per second and core; 100M like these: "
              f"{hours / workers:,.0f} h on {workers} cores, {hours / 640:,.1f} h on 10 machines of 64")
        print(f"kept: {100 * share:.0f}M, {disk:,.1f} TB, {shards:,.0f} shards in one folder, where training "
              f"reads only index.json, {shards * 2e-5:.1f} MB, before it starts (a larger --shard: fewer)")


def pack(cfg, rank, world):
    """Measure, decide, write; rank 0 also writes what exists once."""
    spec, out = cfg.inputs[0], Path(cfg.inputs[1]).resolve()
    for word in [spec] if Path(spec).exists() else spec.split(","):
        root = Path(re.sub(r":\d+$", "", word.strip())).resolve()
        if out == root or root in out.parents or out in root.parents:
            raise ValueError(f"{out} and {root} lie inside each other; name a folder elsewhere")
    source = data.open_source(spec)
    if "procedural" in source.names or source.partners:
        raise ValueError(f"{spec}: pairs and procedural pictures are not packed")
    claim(cfg, source, out, rank)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    workers = cfg.workers or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    size, folder, quiet = min(max(source.count // 1000, 16), 1000), out / "measures", rank > 0 or None
    folder.mkdir(exist_ok=True)
    blocks = [(folder / f"{first:09d}.csv", range(first, min(first + size, source.count)))
              for first in range(0, source.count, size)]
    pace = share_out(measure_block, blocks[rank::world], source, workers, desc="measure", disable=quiet)
    paths = [path for path, _ in blocks]
    wait(paths, cfg.patience)
    table = load(paths, source.count)
    verdict, twin = decide(cfg, table)
    kept = np.flatnonzero(verdict == 0)
    if rank == 0:
        rows = ([*row, fault or VERDICTS[v] + (f" of {better}" if better >= 0 else "")]
                for (*row, fault), v, better in zip(read_rows(paths), verdict, twin, strict=True))
        write_rows(out / "pack.csv", itertools.chain([COLUMNS], rows))
        data.write_whole(out / "pack.png", lambda hidden: draw(hidden, cfg, table, verdict))
        report(cfg, table, verdict, workers, *pace)
    if not len(kept):
        raise ValueError("no picture is left; pack.csv says why")
    if cfg.look:
        return
    columns = kept, table["type"][kept], table["bytes"][kept]
    shards = [(out / f"{n:06d}.tar", *(column[first : first + cfg.shard] for column in columns))
              for n, first in enumerate(range(0, len(kept), cfg.shard))]
    share_out(pack_block, shards[rank::world], source, workers, desc="shards", disable=quiet)
    if rank == 0:
        wait([path for path, *_ in shards], cfg.patience)
        for path in [*out.glob(".*.tar"), *folder.glob(".*.csv")]:  # of runs that were killed
            path.unlink(missing_ok=True)
        text = json.dumps({path.name: len(keys) for path, keys, *_ in shards}, indent=0)
        data.write_whole(out / "index.json", lambda hidden: hidden.write_text(text))
        print(f"wrote {len(shards)} shards, {columns[2].sum() / 2**20:,.0f} MiB: "
              f"python train.py --data {cfg.inputs[1]}")


def main():
    cfg = cli(Config)
    if len(cfg.inputs) != 2:
        die("usage: python tools/pack.py SOURCE OUT; --help lists the options")
    if cfg.shard < 1 or not -1 <= cfg.distance <= 16 or min(cfg.workers, cfg.per_cluster, cfg.patience) < 0:
        die("--shard starts at 1, --distance is -1 to 16; --workers, --per_cluster, --patience start at 0")
    try:
        pack(cfg, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    except OSError as reason:
        die(f"{reason.filename or cfg.inputs[1]} cannot be used: {reason.strerror}")


if __name__ == "__main__":
    launch(main)
