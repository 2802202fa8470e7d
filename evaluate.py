"""Metrics and protocols: how good the pictures are, plain bicubic enlargement beside ours.

    python evaluate.py --protocol folder --data photos/         # photos, degraded here with fixed seeds
    python evaluate.py --protocol realsr --data RealSR/         # camera pairs: RealSR/HR and RealSR/LR, x4
    python evaluate.py --protocol screensr --data ScreenSR/     # as realsr, but LR has the size of HR already
    python evaluate.py --protocol pairs --data out/eval         # any pairs, such as what `folder` wrote
    python evaluate.py --protocol realsr --data RealSR/ --from results/ --against out/eval/per_image.csv

Writes OUT/SR/STEM.png, OUT/per_image.csv and OUT/summary.json, and `folder` also OUT/HR and OUT/LR. Every
score is taken from the 8-bit picture read back from the disk; the printed table says which direction is good.
Scores without a reference, such as NIQE, rise by grain alone: read coherence and lr_psnr beside them.
"""
import csv
import hashlib
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from config import cli, die, validate
from data import DEGRADATIONS, SUFFIXES, degrade, open_source, read_levels, write_image, write_whole
from model import find_weights
from sample import COLORS, HALF, find_model, load, upscale

PROTOCOLS = {"folder": 4, "realsr": 4, "screensr": 1, "pairs": 4}  # scale


@dataclass
class Config:
    protocol: str = "folder"  # folder: photos, degraded here; realsr, screensr, pairs: DATA/HR and DATA/LR
    data: str = ""  # the photos (a folder, a list file, procedural), or the folder of HR/ and LR/
    out: str = "out/eval"  # folder of the results
    model: str = "tiny"  # as in sample.py: a family, one network of it, or a folder with args.json
    weights: str = "weights"  # folder of the weights
    steps: int = 0  # up to 4 use the one-step student; 0: 1 for a student, 25 for a multi-step model
    cfg_scale: float = math.nan  # guidance; nan: the model's own, and -0.5 for published ones on realsr
    alpha: float = 0.1  # structural retention of the partial branch
    seed: int = 42  # first seed of the sampling noise
    seeds: int = 1  # so many seeds, counted up from --seed; scores are averaged within a picture
    color: str = "wavelet"  # colour fix: wavelet, adain, none
    tile: int = 512  # side of a tile of the output in pixels; 0: never tile
    dtype: str = "auto"  # fp32, bf16, fp16; auto: fp32 on the CPU, half precision on a GPU
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them that is there
    scale: int = 0  # enlargement; 0: 1 for screensr, else 4
    degradation: str = "full"  # of the folder protocol: full (two stages, as in training), mild, or full+mild
    limit: int = 0  # only the first so many pictures; 0: all
    from_: str = ""  # score the finished pictures of this folder instead of running a model
    against: str = ""  # per_image.csv of another run: paired comparison, picture by picture; else bicubic
    metric_weights: str = ""  # another niqe_pris_params.npz, or the folder that holds it


# ---------------------------------------------------------------- metrics
# A picture is uint8 (H, W, 3); scores are floats, computed in float64; nan = cannot be computed.
# The definitions are those of the toolbox pyiqa 0.1.15, with the options that the published tables use.


def luma(image, limited):
    """(H, W, 3) -> Y (H, W), not rounded; limited: BT.601 video range 16..235, otherwise 0..255.
    The papers take PSNR and SSIM on the limited range, which gives 20 log10(255 / 219) = 1.32 dB more."""
    if limited:
        return 16 + image @ np.array([65.481, 128.553, 24.966]) / 255
    return image @ np.array([0.299, 0.587, 0.114])


def psnr_y(image, gt, limited=True):
    """Peak signal to noise ratio of Y in dB, higher is better; at most 80, for identical pictures."""
    mse = np.mean((luma(image, limited) / 255 - luma(gt, limited) / 255) ** 2)
    return -10 * math.log10(mse + 1e-8)


def psnr_rgb(image, gt):
    """Peak signal to noise ratio over the three channels in dB, higher is better; at most 80."""
    return -10 * math.log10(np.mean((image / 255 - gt / 255) ** 2) + 1e-8)


def correlate(image, window):
    """Valid correlation of (H, W) with a separable symmetric window (k,) -> (H-k+1, W-k+1)."""
    h, w = image.shape[0] - len(window) + 1, image.shape[1] - len(window) + 1
    image = sum(weight * image[i:i + h] for i, weight in enumerate(window))
    return sum(weight * image[:, i:i + w] for i, weight in enumerate(window))


def gaussian_window(size, sigma):
    """Weights (size,) that sum to 1."""
    window = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * sigma**2))
    return window / window.sum()


def ssim_maps(a, b):
    """Y of two pictures (H, W) -> maps of SSIM and of its contrast-structure factor (H-10, W-10).
    Wang et al. 2004: Gaussian window 11x11, sigma 1.5, biased variances; the factor is clamped at 0."""
    mean = partial(correlate, window=gaussian_window(11, 1.5))
    c1, c2, ma, mb = (0.01 * 255) ** 2, (0.03 * 255) ** 2, mean(a), mean(b)
    cov, var_a, var_b = mean(a * b) - ma * mb, mean(a * a) - ma**2, mean(b * b) - mb**2
    cs = np.maximum((2 * cov + c2) / (var_a + var_b + c2), 0)
    return (2 * ma * mb + c1) / (ma**2 + mb**2 + c1) * cs, cs


def ssim_y(image, gt, limited=True):
    """Structural similarity of the rounded Y, 0..1, higher is better (Wang et al. 2004); sides from 11 px."""
    if min(gt.shape[:2]) < 11:
        return math.nan
    return ssim_maps(luma(image, limited).round(), luma(gt, limited).round())[0].mean()


def pool(image):
    """Mean of 2x2 cells, (H, W) -> (H//2, W//2); an odd last row or column is dropped."""
    h, w = image.shape[0] // 2, image.shape[1] // 2
    return image[:2 * h, :2 * w].reshape(h, 2, w, 2).mean((1, 3))


def ms_ssim_y(image, gt, limited=True):
    """SSIM of the rounded Y on five scales, 0..1, higher is better (Wang et al. 2003); sides from 161 px."""
    if min(gt.shape[:2]) < 161:
        return math.nan
    a, b, score = luma(image, limited).round(), luma(gt, limited).round(), 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        score *= ssim_maps(a, b)[1].mean() ** weight
        odd = [(n % 2, 0) for n in a.shape]  # zeros before an odd side, which count in the mean
        a, b = pool(np.pad(a, odd)), pool(np.pad(b, odd))
    return score * ssim_maps(a, b)[0].mean() ** 0.1333


def gmsd_y(image, gt):
    """Deviation of the gradient similarity of Y (full range), from 0, lower is better (Xue et al. 2014)."""
    def gradient(y):
        y = np.pad(pool(y.round()), 1)
        rows, columns = y[:-2] + y[1:-1] + y[2:], y[:, :-2] + y[:, 1:-1] + y[:, 2:]  # Prewitt sums
        gx, gy = (rows[:, 2:] - rows[:, :-2]) / 3, (columns[2:] - columns[:-2]) / 3
        return np.sqrt(gx**2 + gy**2 + 1e-12)

    if min(gt.shape[:2]) < 4:
        return math.nan
    a, b = gradient(luma(image, False)), gradient(luma(gt, False))
    return np.std((2 * a * b + 170) / (a**2 + b**2 + 170), ddof=1)


def lr_psnr(image, lr):
    """PSNR in dB of the picture, shrunk by Pillow's bicubic filter, against LR; higher is better, at most 80.
    Did the model keep to its input? HR itself scores low where the input is blurred or noisy: see its value.
    """
    small = np.asarray(Image.fromarray(image).resize(lr.shape[1::-1], Image.Resampling.BICUBIC))
    return -10 * math.log10(max(np.mean((small / 255 - lr / 255) ** 2), 1e-8))


LOW, HIGH = slice(2, 16), slice(16, 64)  # bins of 1/128 cycles/px: what a x4 LR holds, what it does not


@cache
def frequency_bin(height, width):
    """Bin of each coefficient of the transform, flat (H*W,): 0..63, or 64 from 0.5 cycles/px on (unused)."""
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    return np.minimum(128 * radius, 64).astype(int).ravel()


def spectrum(image):
    """Hann-windowed Fourier transform of the luma in 0..1 without its mean, flat (H*W,)."""
    y = luma(image, False) / 255
    return np.fft.fft2((y - y.mean()) * np.outer(np.hanning(y.shape[0]), np.hanning(y.shape[1]))).ravel()


def total(x, bins):
    """Sum of x in each bin (65,); nan in the bins that a small picture does not have."""
    return np.where(np.bincount(bins, minlength=65), np.bincount(bins, x, 65), math.nan)


def spectrum_error(image, gt):
    """Power of the picture over the power of gt in dB, per frequency bin (64,)."""
    bins = frequency_bin(*gt.shape[:2])
    count = np.bincount(bins, minlength=65).clip(1)
    a, b = (total(np.abs(spectrum(x)) ** 2, bins) / count + 1e-12 for x in (image, gt))
    return 10 * np.log10(a / b)[:64]


def spec_lo(image, gt, size=np.positive):
    """Mean spectrum error at 0.016..0.125 cycles/px in signed dB, best at 0; size=np.abs: lower is better."""
    return np.nanmean(size(spectrum_error(image, gt)[LOW]))


def spec_hi(image, gt, size=np.positive):
    """Mean spectrum error at 0.125..0.5 cycles/px in signed dB: below 0 is too smooth, above too sharp."""
    return np.nanmean(size(spectrum_error(image, gt)[HIGH]))


def coherence(image, gt):
    """Correlation with gt of the detail at 0.125..0.5 cycles/px, whitened per bin; -1..1, higher is better.
    1: the same detail; 0: none, or one unrelated to gt, such as grain, which raises sharpness."""
    bins, a, b = frequency_bin(*gt.shape[:2]), spectrum(image), spectrum(gt)
    cross, power_a, power_b = (total(x.real, bins)[HIGH] for x in (a * b.conj(), a * a.conj(), b * b.conj()))
    return np.nanmean(cross / np.sqrt(power_a * power_b + 1e-12))


def half_size(image):
    """(H, W) with even sides -> (H/2, W/2): MATLAB's antialiased bicubic imresize, borders mirrored."""
    d = np.abs(np.arange(8) - 3.5) / 2
    weights = np.where(d <= 1, 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2)  # a = -0.5
    return correlate(np.pad(image, 3, "symmetric"), weights / weights.sum())[::2, ::2]


gamma = np.vectorize(math.gamma, otypes=[float])


@cache
def gaussian_shapes():
    """Shape parameters a of a generalised Gaussian (9801,) and G(2/a)^2 / (G(1/a) G(3/a)) of each."""
    shapes = np.arange(0.2, 10.001, 0.001)
    return shapes, gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))


def fit_aggd(x):
    """Fit an asymmetric generalised Gaussian to each row of (N, samples) -> shape, left, right width (N,)."""
    square, left, right = x**2, x < 0, x > 0
    sl, sr = (np.sqrt(np.sum(square * side, 1) / np.sum(side, 1)) for side in (left, right))
    g = sl / sr
    ratio = np.mean(np.abs(x), 1) ** 2 / np.mean(square, 1) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
    shapes, known = gaussian_shapes()
    alpha = shapes[np.searchsorted((known[1:] + known[:-1]) / 2, np.nan_to_num(ratio))]  # the nearest
    unit = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, sl * unit, sr * unit


def niqe_features(image, block):
    """Y (H, W) -> per square block, statistics (N, 18) of contrast-normalised values and their products."""
    window, (h, w) = np.outer(*[gaussian_window(7, 7 / 6)] * 2), image.shape

    def local_mean(x):  # not separably: on flat areas n is the rounding error of this sum, its sign counts
        x = np.pad(x, 3, "edge")
        return sum(window[i, j] * x[i:i + h, j:j + w] for i in range(7) for j in range(7))

    mu = local_mean(image)
    n = (image - mu) / (np.sqrt(np.abs(local_mean(image**2) - mu**2)) + 1)
    rows, columns = n.shape[0] // block, n.shape[1] // block
    n = n.reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)  # (N, block, block)
    alpha, left, right = fit_aggd(n.reshape(len(n), -1))
    features = [alpha, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):  # neighbours, wrapped round within the block
        alpha, left, right = fit_aggd((n * np.roll(n, shift, (1, 2))).reshape(len(n), -1))
        features += [alpha, (right - left) * gamma(2 / alpha) / gamma(1 / alpha), left, right]
    return np.stack(features, 1)


def niqe(image, natural, limited=False):
    """Distance of local statistics from those of natural photos, from 0, lower is better (Mittal 2013).
    natural: mean (36,), covariance (36, 36) of pristine photos. Full-range Y; two blocks of 96 px are needed.
    """
    mu, cov = natural
    y = luma(image, limited).round()
    y = y[:y.shape[0] // 96 * 96, :y.shape[1] // 96 * 96]
    if y.size < 2 * 96 * 96:
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):  # a flat block has no shape and becomes nan
        features = np.concatenate([niqe_features(y, 96), niqe_features(half_size(y), 48)], 1)
    usable = features[~np.isnan(features).any(1)]
    if len(usable) < 2:
        return math.nan
    d = mu - np.nanmean(features, 0)
    return math.sqrt(d @ np.linalg.pinv((cov + np.cov(usable, rowvar=False)) / 2) @ d)


def read_natural(path=""):
    """niqe_pris_params.npz, ours or another, or its folder -> mean (36,), covariance (36, 36) for niqe."""
    path = Path(path or Path(__file__).with_name("assets"))
    path = path / "niqe_pris_params.npz" if path.is_dir() else path
    try:
        with np.load(path) as file:
            return file["mu_pris_param"].reshape(36), file["cov_pris_param"].reshape(36, 36)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not NIQE's niqe_pris_params.npz ({error}); BasicSR has it") from None


# ---------------------------------------------------------------- scores and statistics
METRICS = {  # column: what is better, function of picture and ground truth (LR in lr_psnr, natural in niqe)
    "psnr_y": ("higher", psnr_y), "ssim_y": ("higher", ssim_y), "psnr_rgb": ("higher", psnr_rgb),
    "lr_psnr": ("higher", lr_psnr), "spec_hi": ("near 0", spec_hi), "spec_lo": ("near 0", spec_lo),
    "coherence": ("higher", coherence), "ms_ssim_y": ("higher", ms_ssim_y), "gmsd_y": ("lower", gmsd_y),
    "niqe": ("lower", niqe), "spec_hi_abs": ("lower", partial(spec_hi, size=np.abs)),
    "spec_lo_abs": ("lower", partial(spec_lo, size=np.abs)),
}
SETTINGS = ("model", "ckpt_sha256_8", "steps", "cfg_scale", "alpha", "seed", "dtype", "tile", "seconds")
COLUMNS = ("stem", "set", "height", "width", *SETTINGS, *METRICS)  # of per_image.csv


def score(image, gt, lr, natural):
    """Pictures (H, W, 3), LR (h, w, 3), natural: see niqe -> {column: float}."""
    second = {"lr_psnr": lr, "niqe": natural}
    return {name: float(f(image, second.get(name, gt))) for name, (_, f) in METRICS.items()}


def average(scores):
    """[{column: float}, ...] -> {column: mean of the values that are not nan}; nan where there is none."""
    values = {name: [s[name] for s in scores if not math.isnan(s[name])] for name in scores[0]}
    return {name: sum(v) / len(v) if v else math.nan for name, v in values.items()}


def bootstrap(d, samples=10_000):
    """Differences d (n,), one per picture -> mean and its 95 % interval, by resampling the pictures."""
    d, g = np.asarray(d), np.random.default_rng(0)
    low, high = np.percentile(d[g.integers(0, len(d), (samples, len(d)))].mean(1), [2.5, 97.5])
    return d.mean(), low, high


def compare(ours, theirs):
    """{stem: {column: float}} twice -> {column: mean of ours - theirs, its interval, share won, n}."""
    merit = {"higher": lambda x: x, "lower": lambda x: -x, "near 0": lambda x: -np.abs(x)}
    result = {}
    for name, (better, _) in METRICS.items():
        pairs = [(ours[s][name], theirs[s].get(name, math.nan)) for s in ours if s in theirs]
        pairs = np.array(pairs).reshape(-1, 2).round(6)  # as in the file
        a, b = pairs[~np.isnan(pairs).any(1)].T
        if len(a):
            mean, low, high = map(float, bootstrap(a - b))
            won = float(np.mean(merit[better](a) > merit[better](b)))
            result[name] = dict(mean=mean, low=low, high=high, won=won, n=len(a))
    return result


def read_scores(path):
    """per_image.csv of another run -> {stem: {column: float}}, its bicubic rows left out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("model") != "bicubic"]
        scores = {r["stem"]: {m: float(r[m] or math.nan) for m in METRICS if m in r} for r in rows}
    except (OSError, KeyError, ValueError) as error:
        die(f"--against {path} is not the per_image.csv of a run ({type(error).__name__}: {error})")
    if not rows or len(scores) < len(rows):
        die(f"--against {path} must hold each picture once: {len(rows)} rows, {len(scores)} pictures")
    return scores


# ---------------------------------------------------------------- protocols: which pictures, against what
def read_pixels(path):
    """Image file -> uint8 (H, W, 3), by the one loader: upright, transparency on white, grey repeated."""
    return read_levels(path).permute(1, 2, 0).numpy()


def by_stem(names):
    """{stem: name}, sorted; the stem is what pairs pictures, so two names of one stem are an error."""
    stems = {Path(name).stem: name for name in sorted(names, key=lambda name: Path(name).stem)}
    if len(stems) < len(names):
        alike = [str(name) for name in names if stems[Path(name).stem] != name]
        die(f"{len(alike)} pictures share their name with another, like {alike[0]}: rename them")
    return stems


def list_pictures(folder):
    """{stem: path} of the pictures in a folder."""
    if not folder.is_dir():
        die(f"{folder} is not a folder")
    paths = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    return by_stem(paths) or die(f"{folder} holds no pictures")


def read_pair(hr_path, lr_path, scale):
    """-> ground truth (H, W, 3), LR (h, w, 3), and the LR's file name, which decides the noise."""
    gt, lr = read_pixels(hr_path), read_pixels(lr_path)
    if gt.shape[:2] != (scale * lr.shape[0], scale * lr.shape[1]):
        (H, W), (h, w) = gt.shape[:2], lr.shape[:2]
        raise ValueError(f"{hr_path} is {W}x{H}, not {scale} times its LR's {w}x{h}; cut it, or see --scale")
    return gt, lr, lr_path.name


def make_pair(source, index, stem, cfg):
    """Degrade a photo by draws that depend on its stem alone, write OUT/HR and OUT/LR, read them back.
    HR is the central part whose sides are multiples of 16 * scale: LR and its enlargement then fit the grid
    of the network, 16 px (8 per latent, patches of 2), and no padding enters the scores."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(stem.encode()).hexdigest()[:8], 16))
    hr, grid = source.image(index, generator).float() / 255, 16 * cfg.scale
    (height, width), (H, W) = hr.shape[1:], (side // grid * grid for side in hr.shape[1:])
    if not H * W:
        raise ValueError(f"{stem} is {width}x{height}, photos need {grid} px on the short side")
    top, left = (height - H) // 2, (width - W) // 2
    hr = hr[:, top:top + H, left:left + W]
    lr = degrade(hr[None], generator, cfg.degradation, enlarged=False, scale=cfg.scale)[0]
    paths = [Path(cfg.out, side, f"{stem}.png") for side in ("HR", "LR")]
    for path, image in zip(paths, (hr, lr), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image)
    return read_pair(*paths, cfg.scale)


def find_pairs(cfg):
    """The pictures of the protocol: {stem: function without arguments that returns what read_pair does}."""
    data, out = Path(cfg.data), Path(cfg.out)
    if cfg.protocol == "folder":
        if out.resolve().is_relative_to(data.resolve()):
            die(f"--out {out} lies inside --data {data}, its pictures would count as photos next time")
        if unknown := set(cfg.degradation.split("+")) - set(DEGRADATIONS):
            die(f"unknown degradation {unknown.pop()!r}, choose from: {', '.join(DEGRADATIONS)}")
        source = open_source(cfg.data)
        names = source.names
        if cfg.data == "procedural":
            endless = range(cfg.limit or die("--data procedural is endless: --limit 8"))
            names = [f"procedural_{i:04d}" for i in endless]
        elif source.partners or source.count != len(names):
            die(f"--protocol folder wants photos, one a file; {cfg.data} holds tars or pairs")
        index = {name: i for i, name in enumerate(names)}
        return {stem: partial(make_pair, source, index[name], stem, cfg)
                for stem, name in by_stem(names).items()}
    hr, lr = list_pictures(data / "HR"), list_pictures(data / "LR")
    if alone := sorted(hr.keys() ^ lr.keys()):
        die(f"{data}: {len(alone)} pictures are in only one of HR/ and LR/: {', '.join(alone[:5])}")
    return {stem: partial(read_pair, hr[stem], lr[stem], cfg.scale) for stem in hr}


def find_finished(cfg, pairs):
    """--from: {stem: path}. sample.py's NAME_x4.png belongs to the stem NAME."""
    finished = {}
    for stem, path in list_pictures(Path(cfg.from_)).items():
        stem = stem if stem in pairs else stem.removesuffix(f"_x{cfg.scale}")
        if stem not in pairs or stem in finished:
            die(f"{path} has no ground truth in {cfg.data}" if stem not in pairs else
                f"{path} and {finished[stem].name} both belong to {stem}")
        finished[stem] = path
    return finished


# ---------------------------------------------------------------- the run
def restore(cfg, vosr, lr, name, stem):
    """Run the model on LR (h, w, 3), once per seed -> pictures as saved in OUT/SR, seconds per picture."""
    pictures, seconds = [], 0.0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        start = time.perf_counter()
        picture = upscale(Image.fromarray(lr), vosr, cfg.scale, cfg.steps, seed, name, cfg.cfg_scale,
                          cfg.alpha, cfg.tile, cfg.color)
        seconds += time.perf_counter() - start
        path = Path(cfg.out, "SR" if seed == cfg.seed else f"SR-{seed}", f"{stem}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        pictures.append(read_pixels(path))
    return pictures, seconds / cfg.seeds


def prepare(cfg):
    """Check a call, fill in what protocol and model decide -> cfg, pairs, finished pictures, vosr or None."""
    validate(cfg, protocol=PROTOCOLS, color=COLORS, dtype=("auto", *HALF), seeds=1, steps=0, scale=0, limit=0,
             tile=0)
    if not cfg.data:
        die("--data is needed: the photos, or the folder of HR/ and LR/")
    cfg = replace(cfg, scale=cfg.scale or PROTOCOLS[cfg.protocol])
    pairs = find_pairs(cfg)
    if cfg.from_:
        return cfg, pairs, find_finished(cfg, pairs), None
    vosr = load(cfg.model, cfg.steps, cfg.weights, cfg.dtype, cfg.device)
    guidance = cfg.cfg_scale
    if math.isnan(guidance):  # the authors' value for RealSR belongs to their models
        authors = cfg.protocol == "realsr" and vosr.dit.cfg.ae_type != "tiny" and not vosr.one_step
        guidance = -0.5 if authors else vosr.defaults["cfg_scale"]
    return replace(cfg, steps=cfg.steps or vosr.defaults["steps"], cfg_scale=guidance), pairs, {}, vosr


def describe(cfg, vosr):
    """The columns SETTINGS of a run; empty where they had no influence, such as guidance on a student."""
    if vosr is None:
        return dict.fromkeys(SETTINGS, "") | dict(model=f"{cfg.from_}/")  # the slash: a folder, not a model
    settings = {name: getattr(cfg, name) for name in ("model", "steps", "cfg_scale", "alpha", "seed", "tile")}
    settings |= dict(cfg_scale="", alpha="") if vosr.one_step else {}
    checkpoint = np.memmap(find_weights(find_model(cfg.model, cfg.steps, cfg.weights)[0]), mode="r")
    dtype = next(name for name, half in HALF.items() if half == vosr.half)
    return settings | dict(ckpt_sha256_8=hashlib.sha256(checkpoint).hexdigest()[:8], dtype=dtype)


def score_pair(cfg, known, stem, pair, finished, vosr, natural):
    """Scores of bicubic, ours and the ground truth alone, and the settings of `describe` beside ours.
    Kept in OUT/scores/STEM.json: taken from there while the pictures and `known`, settings and code, are the
    same. finished: path of --from's picture, or None; pair: see find_pairs. ValueError: sizes differ."""
    gt, lr, name = pair()
    pictures, seconds = [read_pixels(finished)] if finished else [], ""
    key = repr(known).encode() + b"".join(map(np.ndarray.tobytes, (gt, lr, *pictures)))
    key = hashlib.sha256(key).hexdigest()
    note, picture = Path(cfg.out, "scores", f"{stem}.json"), Path(cfg.out, "SR", f"{stem}.png")
    kept = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if kept.get("key") == key and (finished or picture.is_file()):
        return kept
    note.unlink(missing_ok=True)                                                # its picture will change
    if vosr:
        pictures, seconds = restore(cfg, vosr, lr, name, stem)
    if pictures[0].shape != gt.shape:
        (H, W, _), (h, w, _) = gt.shape, pictures[0].shape
        raise ValueError(f"{finished} is {w}x{h}, its ground truth {W}x{H}")
    bicubic = np.asarray(Image.fromarray(lr).resize(gt.shape[1::-1], Image.Resampling.BICUBIC))
    row = dict(stem=stem, set=Path(cfg.data).resolve().name, height=gt.shape[0], width=gt.shape[1])
    ours = average([score(picture, gt, lr, natural) for picture in pictures])
    kept = dict(key=key, lr_sha256=hashlib.sha256(lr.tobytes()).hexdigest(),
                rows=[row | dict(model="bicubic") | score(bicubic, gt, lr, natural),
                      row | known[0] | dict(seconds=seconds) | ours],
                original=dict(lr_psnr=lr_psnr(gt, lr), niqe=niqe(gt, natural)))
    note.parent.mkdir(exist_ok=True)
    write_whole(note, lambda path: path.write_text(json.dumps(kept), encoding="utf-8"))
    return kept


def evaluate(cfg):
    """Run a protocol, write OUT/per_image.csv and OUT/summary.json -> the content of the latter.
    Under torchrun the ranks share the pictures, and all but the first end here, with code 0."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))             # ranks wait for the slowest
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        theirs = read_scores(cfg.against) if cfg.against else {}
        natural = read_natural(cfg.metric_weights)
        cfg, pairs, finished, vosr = prepare(cfg)
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        die(error)
    if theirs and not theirs.keys() & pairs.keys():
        die(f"--against {cfg.against} has no picture in common with {cfg.data}")
    missing = [stem for stem in pairs if cfg.from_ and stem not in finished]
    stems, settings = [stem for stem in pairs if stem not in missing][:cfg.limit or None], describe(cfg, vosr)
    code = b"".join(file.read_bytes() for folder in (".", "kernels")
                    for file in sorted(Path(__file__).parent.joinpath(folder).glob("*.py")))
    known = (settings, asdict(replace(cfg, data="", out="", from_="", against="", limit=0)),
             hashlib.sha256(code).hexdigest())

    for share in (stems[rank::world], stems)[world == 1:]:                      # first among ranks, then all
        done, failed = [], []
        for stem in tqdm(share, unit="picture", disable=True if rank else None):
            try:
                done.append(score_pair(cfg, known, stem, pairs[stem], finished.get(stem), vosr, natural))
            except (ValueError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
                failed.append(f"{stem}: {error}")
        if share is not stems:                                                  # the first rank collects
            dist.barrier()
        if rank:
            sys.exit(0)
    if not done:
        die(f"none of {len(failed)} pictures could be scored; {failed[0]}")
    rows = [row for kept in done for row in kept["rows"]]

    with open(Path(cfg.out, "per_image.csv"), "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows:
            cells = {k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()}
            table.writerow({k: "" if v == "nan" else v for k, v in cells.items()})
    originals, lr_sha256 = [k["original"] for k in done], "".join(k["lr_sha256"] for k in done)
    bicubic, ours = ([{name: row[name] for name in METRICS} for row in rows[i::2]] for i in (0, 1))
    stems = [row["stem"] for row in rows[1::2]]
    summary = dict(
        protocol=cfg.protocol, count=len(stems), settings=asdict(cfg) | settings,
        means={"bicubic": average(bicubic), settings["model"]: average(ours), "HR": average(originals)},
        seconds=sum(row["seconds"] for row in rows[1::2]) / len(stems) if vosr else None,
        against=compare(dict(zip(stems, ours, strict=True)),
                        theirs or dict(zip(stems, bicubic, strict=True))), failed=failed, missing=missing,
        lr_sha256=hashlib.sha256(lr_sha256.encode()).hexdigest(),
        device=str(next(vosr.parameters()).device) if vosr else None,
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                      pillow=PIL.__version__))
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # JSON has no nan: null
    Path(cfg.out, "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    for name in METRICS:
        if empty := sum(math.isnan(scores[name]) for scores in ours):
            print(f"warning: {name} needs more pixels or detail, it is empty for {empty} of {len(ours)}")
    return summary


def report(summary):
    """Print the table of means, the paired comparison, what is missing and what failed."""
    shown, settings = [name for name in METRICS if not name.endswith("_abs")], summary["settings"]
    print(f"{summary['protocol']}: means of {summary['count']} pictures, 8-bit files, no border cut")
    print(f"{'':15}", *(f"{name:>9}" for name in shown))
    print(f"{'better is':15}", *(f"{METRICS[name][0]:>9}" for name in shown))
    for model, means in summary["means"].items():
        cells = ("" if means.get(name) is None else f"{means[name]:.4f}" for name in shown)
        print(f"{model[-15:]:15}", *(f"{cell:>9}" for cell in cells))
    print("HR: what the ground truth reaches. psnr_y, ssim_y, ms_ssim_y: Y of 16..235; others: Y of 0..255")
    if summary["device"]:
        print(f"{settings['steps']} steps: {summary['seconds']:.2f} s per picture on {summary['device']}")
    if summary["against"]:
        print(f"ours - {settings['against'] or 'bicubic'}: mean, 95 % interval (* without 0), share won")
        for name, d in summary["against"].items():
            star = " " if d["low"] <= 0 <= d["high"] else "*"
            interval = f"[{d['low']:+.4f}, {d['high']:+.4f}]"
            print(f"{name:12}{star}{d['mean']:+9.4f} {interval:>22} {d['won']:5.0%} of {d['n']}")
    for word in ("missing", "failed"):
        if summary[word]:
            print(f"{len(summary[word])} {word}:", *summary[word], sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    try:
        summary = evaluate(cli(Config))
    except KeyboardInterrupt:
        die("interrupted; the same command goes on from what is finished", 130)
    report(summary)
    sys.exit(1 if summary["failed"] else 0)
