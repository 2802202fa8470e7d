"""What the degradation draws, beside the official distributions; its speed, beside the official operations.

    python tools/degradation.py stats --reference degradation_distributions.json --images HR.safetensors
    python tools/degradation.py bench        # ms per image at 256 and 512 px, batch 1 and 8
    python tools/degradation.py bench --device cuda --sizes 512 --batches 64                  # ours alone

stats draws a sheet of histograms, blue, with a reference in red, and ends with code 1 if a share of values
below one of its quantiles, a fraction, or a median sharpness is off by more than 4 standard errors. Sharpness
and PSNR depend on the pictures: they are compared only if --images are those of the reference.
bench takes turns: data.degrade, and the operations as the official loader calls them, on batches that share
all draws but gray flags; each sample's draws serve one such batch. CPU seconds are those of this process.
"""
import json
import math
import re
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from config import cli, die, launch

QUANTILES, STORED, LIMIT = (0.05, 0.25, 0.5, 0.75, 0.95), "q05_25_50_75_95", 4  # LIMIT in standard errors


@dataclass
class Config:
    draws: int = 5000  # stats: samples to draw
    reference: str = ""  # stats: JSON file of the official distributions; default: only the sheet
    images: str = ""  # stats: safetensors file of uint8 HR pictures (N, 3, H, W), which take turns
    pictures: int = 3000  # stats: how many of the draws are applied to --images
    out: str = "degradation.png"  # stats: the sheet (also -o)
    sizes: str = "256,512"  # bench: sides of HR in pixels, from 74, with commas between
    batches: str = "1,8"  # bench: images per batch, with commas between
    samples: int = 96  # bench: images per row, at least one batch
    device: str = "cpu"  # bench: cpu or cuda
    seed: int = 0  # same seed, same draws
    inputs: tuple = ()  # stats or bench


def describe(draw):
    """The draws of one sample under the names of the reference: float, or str where it is a choice."""
    found = dict(second_blur="kernel2" in draw, final_sinc="sinc" in draw,
                 order="jpeg_sinc" if "jpeg2_early" in draw else "sinc_jpeg")
    for key, value in draw.items():
        key = re.sub("_early|_late", "", key).replace("sinc", "final_sinc")
        value = value if isinstance(value, dict) else dict(quality=value)
        family = value.get("kind", "").partition("_")[0]
        strength = "sigma" if family == "gaussian" else "poisson_scale"
        names = dict(beta=f"beta_{family}", scale_factor="factor", strength=strength)
        found |= {f"{key}_{names.get(name, name)}": v for name, v in value.items()}
        if key[:-1] == "kernel":
            weights = data.blur_kernel(**value).double()
            r2 = (torch.arange(len(weights)) - len(weights) // 2) ** 2
            found[f"{key}_centre_weight"] = weights[r2 == 0, r2 == 0].item()
            if family != "sinc":
                found[f"{key}_rms_radius"] = (weights * (r2 + r2[:, None]) / 2).sum().sqrt().item()
        if factor := found.get(f"{key}_factor"):
            found[f"{key}_kind"] = "up" if factor > 1 else "down" if factor < 1 else "keep"
    return {name: v if isinstance(v, float | str) else str(int(v)) for name, v in found.items()
            if not isinstance(v, tuple) and name != "final_sinc_kind"}


def collect(cfg, images):
    """{name: values} of cfg.draws samples, and of what the first cfg.pictures do to images, if there are."""
    values, side = {}, 96 if images is None else images.shape[-1]
    for i in range(cfg.draws):
        generator = partial(data.keyed_generator, "cpu", "stats", cfg.seed, i)
        found = describe(draw := data.draw_batch(1, side, side, generator())[0])
        if images is not None and i < cfg.pictures:
            hr, mode = images[i % len(images)], draw["resize_back"]["mode"]
            lr = data.degrade(hr[None], generator())[0]
            x = data.luma(torch.stack([hr, lr]))[:, 0] * 255
            x = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * x[:, 1:-1, 1:-1]
            ratio, shift, mse = (x[1].var() / x[0].var()).item(), (lr - hr).mean(), (lr - hr).square().mean()
            found |= {"sharpness_ratio": ratio, f"sharpness_ratio_when_back_{mode}": ratio,
                      "sharpness_log10_ratio": math.log10(ratio), "psnr": -10 * math.log10(mse),
                      "mean_level_shift_255": 255 * shift.item()}
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return values


def judge(name, own, want):
    """Own values against a stored distribution -> (what differs most, ours, theirs, standard errors)."""
    n, runs = len(own), want["n"]  # both sides are samples, so both have an error
    if theirs := want.get("fraction"):
        rows = [(w, own.count(w) / n, theirs.get(w, 0.0)) for w in sorted({*own, *theirs})]
    else:  # where many values are equal, the quantile may be any part of them
        own, pairs = np.array(own), zip(QUANTILES, want[STORED], strict=True)
        rows = [(f"< {q:.4g}", min(max(p, (own < q).mean()), (own <= q).mean()), p) for p, q in pairs]
    rows = [(*row, max(math.sqrt(row[-1] * (1 - row[-1]) * (1 / n + 1 / runs)), 1e-9)) for row in rows]
    if "when_back" in name:  # 2.5 % is the error of the reference, estimated from its quartiles
        rows.append(("median", np.median(own), m := want[STORED][2], 0.025 * m * math.sqrt(1 + runs / n)))
    return max(((*row[:3], abs(row[1] - row[2]) / row[3]) for row in rows), key=lambda row: row[-1])


def draw_panel(sheet, x0, y0, title, own, want):
    """Blue: own values; red: the reference, boxes for its fractions or lines at its five quantiles."""
    theirs, pen, y1, w = want.get("fraction", {}), ImageDraw.Draw(sheet), y0 + 82, 240
    words = sorted({*own, *theirs}, key=lambda word: word.zfill(2)) if isinstance(own[0], str) else []
    numbers, n = [words.index(value) + 0.5 for value in own] if words else own, len(words) or 30
    low, high = (0, n) if words else np.quantile(own, (0.005, 0.995), method="nearest")
    heights = np.histogram(numbers, n, (low, high + 1e-9))[0] / len(own)
    boxes = [(i, i + 0.9, height, "steelblue") for i, height in enumerate(heights)]
    boxes += [(i, i + 0.9, theirs.get(word, 0.0), None) for i, word in enumerate(words) if theirs]
    boxes += [((q - low) / (high - low) * n,) * 2 + (max(heights), None) for q in want.get(STORED, ())]
    for left, right, height, ink in boxes:
        top = y1 - 58 * height / max(box[2] for box in boxes)
        pen.rectangle((x0 + left / n * w, top, x0 + right / n * w, y1), ink, ink or "red")
    for i, text in enumerate(words) if words else ((1, f"{low:.3g}"), (28, f"{high:.3g}")):
        text = re.sub("(.{5})[a-z]*_", r"\1\n", text)  # or the kinds of kernels would not fit
        pen.text((x0 + (i + 0.45) / n * w, y1 + 3), text, "black", anchor="ma", spacing=0)
    pen.text((x0, y0 + 3), title, "red" if "OUTSIDE" in title else "black")


def stats(cfg):
    """Write the sheet, print the comparison -> whether everything is distributed as in the reference."""
    try:
        text = Path(cfg.reference).read_text() if cfg.reference else '{"values": {}}'
        reference = json.loads(text.replace("Gaussian_", ""))["values"]  # Gaussian_iso is our iso
        own = collect(cfg, next(iter(load_file(cfg.images).values())) / 255 if cfg.images else None)
        rows = {name: judge(name, own[name], reference[name]) for name in sorted(own.keys() & reference)}
        marks = {n: f"{row[-1]:.1f} s.e." + "  OUTSIDE" * bool(row[-1] > LIMIT) for n, row in rows.items()}
        sheet = Image.new("RGB", (6 * 256, -(-len(own) // 6) * 124), "white")
        for i, name in enumerate(sorted(own)):
            title = f"{name}, {len(own[name])}, {marks.get(name, '')}"
            draw_panel(sheet, 8 + i % 6 * 256, i // 6 * 124, title, own[name], reference.get(name, {}))
        sheet.save(cfg.out)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as reason:
        die(f"--reference, --images or --out: {type(reason).__name__}: {reason}")
    for name, (what, ours, theirs, _) in rows.items():
        print(f"{name:<34} {len(own[name]):>5} {what:<16} {ours:.4f}, reference {theirs:.4f}, {marks[name]}")
    outside = sum("OUTSIDE" in mark for mark in marks.values())
    print(f"{len(rows)} values compared, {outside} more than {LIMIT} standard errors off; wrote {cfg.out}")
    print("sharpness and PSNR: compared only on the --images of the reference\n" * (not cfg.images), end="")
    return not outside


# ---------------------------------------------------------------- the operations of the official loader
def plain_blur(x, kind="iso", size=21, sigma_x=1e-3, **rest):
    """21x21 weights for every kernel, the unit pulse, too, which is the default; a batch as 3 B channels."""
    kernel = F.pad(data.blur_kernel(kind, size, sigma_x, **rest), [(21 - size) // 2] * 4)[None, None]
    shape, x = x.shape, F.pad(x, [10] * 4, mode="reflect").flatten(0, 1)
    x, kernel = (x[:, None], kernel) if shape[0] == 1 else (x[None], kernel.repeat(len(x), 1, 1, 1))
    return F.conv2d(x, kernel, groups=len(kernel)).view(shape)


def plain_noise(x, draw, gray, randn, poisson):
    """Noise in colour for all samples; as soon as one is gray, (B,) bools, gray noise for all, too."""
    def shot(image):
        q = (image * 255).round().clamp(0, 255) / 255
        v = torch.tensor([2.0 ** math.ceil(math.log2(len(one.unique()))) for one in q]).view(-1, 1, 1, 1)
        return poisson(q * v) / v - q

    gaussian, gray = draw["kind"] == "gaussian", torch.tensor(gray).float().view(-1, 1, 1, 1)
    noise = randn(x.shape) / 255 if gaussian else shot(x)
    if gray.any():
        common = randn((1, 1, *x.shape[-2:])) / 255 if gaussian else shot(data.luma(x))
        noise = noise * (1 - gray) + common * gray
    return (x + noise * draw["strength"]).clamp(0, 1)


def plain_jpeg(x, quality):
    """Blocks of 8x8 times a table of 8x8x8x8, for the three planes one by one; quality: a list."""
    cosines, (h, w) = torch.from_numpy(np.einsum("ux,vy->xyuv", *[data.COSINES] * 2)).float(), x.shape[-2:]
    factor = torch.tensor([5000 / q if q < 50 else 200 - 2 * q for q in quality]).view(-1, 1, 1, 1, 1) / 100
    x = F.pad(x.clamp(0, 1) * 255, (0, -w % 16, 0, -h % 16)).permute(0, 2, 3, 1)                # (B, H, W, 3)
    planes = list((torch.tensordot(x, data.TO_YCBCR, ([3], [1])) - torch.tensor([128, 0, 0])).unbind(3))
    for i, plane in enumerate(planes):
        step = (data.CHROMA_TABLE if i else data.LUMA_TABLE) * factor
        plane = F.avg_pool2d(plane, 2) if i else plane
        blocks = torch.tensordot(plane.unfold(1, 8, 8).unfold(2, 8, 8), cosines, 2)     # (B, H/8, W/8, 8, 8)
        blocks = torch.tensordot((blocks / step).round() * step, cosines.permute(2, 3, 0, 1), 2)
        plane = blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)                                # (B, H, W)
        planes[i] = plane.repeat_interleave(2, 1).repeat_interleave(2, 2) if i else plane + 128
    x = torch.tensordot(torch.stack(planes, dim=3), data.TO_RGB, ([3], [1])).permute(0, 3, 1, 2)
    return x[..., :h, :w].clamp(0, 255) / 255


def plain_degrade(x, draws, k, randn, poisson):
    """data.degrade_with for a batch that shares the draws of sample k but gray flags; no step is skipped."""
    draw = draws[k]
    size = {n: {k: v for k, v in d.items() if k != "factor"} for n, d in draw.items() if "resize" in n}
    for n, quality in (("1", "jpeg1"), ("2", "jpeg2_early")):
        x = plain_blur(x, **draw[f"kernel{n}"]) if f"kernel{n}" in draw else x
        gray = [other[f"noise{n}"]["gray"] for other in draws]
        x = plain_noise(F.interpolate(x, **size[f"resize{n}"]), draw[f"noise{n}"], gray, randn, poisson)
        x = plain_jpeg(x, [draw[quality]] * len(x)) if quality in draw else x
    x = plain_blur(F.interpolate(x, **size["resize_lr"]), **draw.get("sinc", {}))
    x = plain_jpeg(x, [draw["jpeg2_late"]] * len(x)) if "jpeg2_late" in draw else x
    return data.round_levels(F.interpolate(x, **size["resize_back"]))


def bench(cfg):
    """Print a row per size and batch: means over the batches of ours, and the median of their ratios."""
    torch.set_num_threads(1)
    cuda, g = cfg.device == "cuda", torch.Generator().manual_seed(cfg.seed)
    fields = partial(torch.randn, generator=g), partial(torch.poisson, generator=g)
    clock = (lambda: torch.cuda.synchronize() or time.perf_counter()) if cuda else time.process_time
    seconds = partial(timeit, timer=clock, number=1)
    pairs = [(int(s), int(b)) for s in cfg.sizes.split(",") for b in cfg.batches.split(",")]
    if min(pairs)[0] < 74 or min(batch for _, batch in pairs) < 1:
        die("--sizes start at 74, where the plain blur still works, --batches at 1")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'CPU, 1 thread'}\n")
    print("| size | batch | plain, ms/image | ours, ms/image | ratio | median | images/s | batches | syncs |")
    print("|---" * 9 + "|")
    for size, batch in pairs:
        rows, hr = [], torch.rand(batch, 3, 32, 32, generator=g).to(cfg.device)
        hr = F.interpolate(hr, (size, size), mode="bilinear")
        for i in range(-1, max(1, cfg.samples // batch)):  # -1 warms up
            generator = partial(data.keyed_generator, cfg.device, "bench", cfg.seed, size, i)
            ours = seconds(partial(data.degrade, hr, generator()))
            draws = data.draw_batch(batch * (not cuda), size, size, generator())  # as degrade drew them
            plain = [seconds(partial(plain_degrade, hr, draws, k, *fields)) for k in range(len(draws))]
            rows.append((ours / batch, sum(plain) / batch**2 or math.nan))
        with warnings.catch_warnings(record=True, action="always") as seen:
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
                data.degrade(hr, generator())
                torch.cuda.set_sync_debug_mode("default")
        ours, plain = 1000 * np.mean(rows[1:], axis=0)
        median, syncs = np.median([b / a for a, b in rows[1:]]), sum("called" in str(w.message) for w in seen)
        print(f"| {size} | {batch} | {plain:.1f} | {ours:.1f} | {plain / ours:.2f} | {median:.2f} | "
              f"{1000 / ours:.1f} | {len(rows) - 1} | {syncs} |", flush=True)


def main():
    cfg = cli(Config)
    if cfg.inputs not in (("stats",), ("bench",)) or min(cfg.draws, cfg.pictures, cfg.samples) < 1:
        die("usage: python tools/degradation.py stats, or bench; --draws, --pictures, --samples start at 1")
    if cfg.device not in ("cpu", "cuda") or (cfg.device == "cuda" and not torch.cuda.is_available()):
        die(f"--device {cfg.device} is not there; give cpu, or cuda on a machine with such a GPU")
    sys.exit(not stats(cfg)) if cfg.inputs == ("stats",) else bench(cfg)


if __name__ == "__main__":
    launch(main)
