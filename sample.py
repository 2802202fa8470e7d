"""Enlarge pictures: encode, integrate from noise to an image latent (Eq. 2), decode, fix the colours.

    python sample.py --steps 1 input.png                   # writes input_x4.png beside it
    python sample.py --steps 25 photos/ -o out/            # the multi-step network, a whole folder
"""
import itertools
import math
import re
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from glob import glob
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageStat
from tqdm import tqdm

import data
from config import cli, die, launch, validate
from model import FROZEN, GRID, VOSR, choose_device, guided_velocity, load_dit, load_frozen, read_settings

MULTI_STEP = dict(steps=25, cfg_scale=0.5)  # the authors' practical default; they use -0.5 on RealSR
ONE_STEP = dict(steps=1, cfg_scale=None)    # guidance was distilled into the student
DEFAULTS = {  # where each model lies in the weights folder, and how it is sampled unless told otherwise
    "tiny-ms": dict(folder="tiny/ms", ae_type="tiny", steps=25, cfg_scale=1.0),  # its partial branch is young
    "tiny-os": dict(folder="tiny/os", ae_type="tiny", **ONE_STEP),
    "0.5B-ms": dict(folder="VOSR_0.5B_ms", ae_type="sd2", **MULTI_STEP),
    "0.5B-os": dict(folder="VOSR_0.5B_os", ae_type="sd2", **ONE_STEP),
    "1.4B-ms": dict(folder="VOSR_1.4B_ms", ae_type="qwen", **MULTI_STEP),
    "1.4B-os": dict(folder="VOSR_1.4B_os", ae_type="qwen", **ONE_STEP),
    "2.0": dict(folder="VOSR2", ae_type="qwen", **ONE_STEP),
}
FAMILIES = tuple(dict.fromkeys(name.removesuffix("-ms").removesuffix("-os") for name in DEFAULTS))
HUB = "https://huggingface.co/CSWRY/VOSR/resolve/main"  # the authors' files, named as below weights/
COLORS = ("wavelet", "adain", "none")
HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Config:
    model: str = "tiny"  # tiny, 0.5B, 1.4B, 2.0; tiny-ms, tiny-os, ... force one network; or a folder
    steps: int = 0  # sampling steps, up to 4 with the one-step student; 0: the model's own, 1 or 25
    scale: float = 4.0  # enlargement, any number from 1
    size: str = ""  # exact size of the output such as 1920x1080, instead of --scale
    long: int = 0  # longer side of the output in pixels, instead of --scale
    seed: int = 42  # same seed and file name, same picture
    cfg_scale: float = math.nan  # guidance of multi-step models: 0 invents, 1 obeys; nan: the model's own
    alpha: float = 0.1  # structural retention of the partial branch (0 where trained so); official: 0.15
    fidelity: float = 0.0  # 0: as trained ... 1: no noise, softer and closer to the input
    color: str = "wavelet"  # colour fix: wavelet, adain, none
    tile: int = 512  # side of a tile in pixels of the output; 0: never tile
    posterior: str = "mode"  # latent of the input: the mode of the autoencoder's posterior, or a sample
    dtype: str = "auto"  # fp32, bf16, fp16; auto: fp32 on a CPU, half precision on a GPU
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them that is there
    weights: str = "weights"  # folder of the weights
    overwrite: bool = False  # redo outputs that are there already
    ext: str = "png"  # format of the outputs: png, jpg, webp, tif
    strip: bool = False  # leave the colour profile out
    max_pixels: int = data.MAX_PIXELS  # larger inputs are refused, from their header
    compile: bool = False  # torch.compile: pays for many pictures of one size
    out: str = ""  # folder of the outputs (also -o); default: beside each input
    inputs: tuple = ()  # pictures and folders; after -- names may start with a dash


# ---------------------------------------------------------------- the sampler (Eq. 2, Euler)
def time_grid(steps, schedule="linear"):
    """(steps + 1,) times falling from 1 (noise) to 0 (image). The official scripts always use linear."""
    if schedule == "cosine":
        return torch.linspace(0, math.pi / 2, steps + 1).cos()
    return torch.linspace(1, 0, steps + 1)


@torch.no_grad()
def euler(net, z, c_str, c_sem, times, alpha=0.1, cfg_scale=None, interval=(0, 1)):
    """Integrate dz/dt = v from noise z at times[0] = 1 to an image latent at times[-1] = 0, in float32.

    z, c_str (B, C, h, w); c_sem (B, N, enc_dim). With cfg_scale, net is a multi-step network, guided by Eq. 2
    where t lies in `interval` and fully conditioned elsewhere. Without, net is a student and each step is
    z - (t - r) f(z, t, r), with r the next time (Eq. 4)."""
    for t, t_next in itertools.pairwise([float(t) for t in times]):
        now = z.new_full((len(z),), t)
        if cfg_scale is None:
            v = net(z, now, c_str, c_sem, r=z.new_full((len(z),), t_next))
        elif cfg_scale != 1 and interval[0] <= t <= interval[1]:
            v = guided_velocity(net, z, now, c_str, c_sem, alpha, cfg_scale)
        else:
            v = net(z, now, c_str, c_sem)
        z = torch.sub(z, v.float(), alpha=t - t_next)
    return z


# ---------------------------------------------------------------- tiles
def tile_layout(length, tile, overlap):
    """Starts of the tiles that cover 0 ... length; the last one is moved back to end there."""
    starts = list(range(0, max(length - tile, 0) + 1, max(tile - overlap, 1)))
    return starts if starts[-1] + tile >= length else [*starts, length - tile]


def gaussian_window(height, width):
    """(height, width) weights of a tile's velocity; the variance is 1 % of the squared side."""
    y, x = (torch.exp(-((torch.arange(n) - (n - 1) / 2) / n) ** 2 / 0.02) for n in (height, width))
    return y[:, None] * x


def tiled(net, places, height, width, semantics, batch=1):
    """A net for `euler` that runs `net` on tiles and blends: v = sum(g v_tile) / sum(g), g Gaussian.

    places: (top, left) of each tile; batch: tiles per call of `net`; semantics(range of tiles) -> theirs, by
    DiT.semantics. The result knows them: its c_sem is []. z has a batch of 1, or of 2 with both branches."""
    def blended(z, t, c_str, c_sem, r=None):
        g = gaussian_window(height, width).to(z.device)
        total, weight = torch.zeros_like(z), z.new_zeros(z.shape[-2:])
        for first in range(0, len(places), batch):
            some = range(first, min(first + batch, len(places)))
            cuts = [(..., slice(y, y + height), slice(x, x + width)) for y, x in (places[k] for k in some)]
            z_t, c = (torch.stack([a[cut] for cut in cuts], dim=1).flatten(0, 1) for a in (z, c_str))
            times = [None if a is None else a.repeat_interleave(len(cuts)) for a in (t, r)]
            v = net(z_t, times[0], c, semantics(some), r=times[1])                  # (B n, C, h, w)
            for cut, v_tile in zip(cuts, v.float().unflatten(0, (len(z), -1)).unbind(1), strict=True):
                total[cut] += g * v_tile
                weight[cut] += g
        return total.div_(weight)

    return blended


KEPT_TILES = 8  # semantic keys and values kept over the steps; 1.4B: 450 MB a tile in fp32, else done again
MARGIN, RAMP = 6, 4  # latent cells that a tile's own border spoils; width of the cross-fade behind them


def assemble(piece, height, width, tile):
    """Bands of the whole, top to bottom, from overlapping pieces: yields (first row, (..., rows, f width)).

    piece(top, left, h, w) -> (..., f h, f w), float, for a window of latent cells. Pieces are cross-faded
    where all of them are sound: the tiny autoencoder sees no further than MARGIN, so tiles change nothing;
    the published ones have norms and attention over the window."""
    tile, overlap, rest = max(tile, 32), 2 * MARGIN + RAMP, None
    h, w = min(tile, height), min(tile, width)

    def fade(start, length, f, device):  # 0 ... 1 at the near end, 1 throughout where the picture begins
        cells = (torch.arange(length, device=device) + 0.5) / f
        return ((cells - MARGIN) / RAMP).clamp(0, 1) if start else torch.ones_like(cells)

    for top, below in itertools.pairwise([*tile_layout(height, tile, overlap), height]):
        band = None
        for left in tile_layout(width, tile, overlap):
            new = piece(top, left, h, w)
            f = new.shape[-1] // w
            if band is None:
                band = new.new_zeros(*new.shape[:-2], f * h, f * width)
            cols = band[..., f * left:f * (left + w)]
            cols.lerp_(new, fade(left, f * w, f, new.device))
        if rest is not None:  # what the pieces above said of these rows
            shared = band[..., :rest.shape[-2], :]
            shared.copy_(rest.lerp_(shared, fade(top, rest.shape[-2], f, band.device)[:, None]))
        yield f * top, band[..., :f * (below - top), :]
        rest = band[..., f * (below - top):, :].clone()  # not the whole band


# ---------------------------------------------------------------- colour
def adain(picture, reference):
    """What each 8-bit level of an RGB picture becomes, (3, 256) in [0, 1], to give its channels the mean and
    the deviation of the reference, a picture of any size."""
    stats = [ImageStat.Stat(p) for p in (picture, reference)]
    mean, std, mean_, std_ = (torch.tensor(m).view(3, 1) / 255 for s in stats for m in (s.mean, s.stddev))
    levels = (torch.arange(256) / 255 - mean) / (std + 1e-5) * (std_ + 1e-5) + mean_
    return levels.clamp(0, 1)


def reflect(length, before, after):
    """Indices of an axis of any length from 1, extended by mirroring."""
    return np.pad(np.arange(length), (before, after), mode="reflect")


def low_band(image, sigma=5.0, reach=20):
    """Gaussian blur of (3, H, W), borders mirrored."""
    kernel = torch.exp(-((torch.arange(-reach, reach + 1, device=image.device) / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    rows, cols = (torch.from_numpy(reflect(n, reach, reach)).to(image.device) for n in image.shape[1:])
    image = F.conv2d(image[None, :, rows], kernel.mT, groups=3)
    return F.conv2d(image[..., cols], kernel, groups=3)[0]


def wavelet(image, reference):
    """Exchange the low band of image (3, H, W) in [0, 1] for the reference's. The name is the authors'."""
    return (image + low_band(reference - image)).clamp(0, 1)


# ---------------------------------------------------------------- one picture
@contextmanager
def shared_norms(vae, look):
    """Group norms of the published autoencoder ought to see the whole picture, or tiles differ in tone: here
    all have the statistics of the windows that look() runs through it as one batch."""
    norms, moments = [m for m in vae.modules() if isinstance(m, torch.nn.GroupNorm) and look], {}

    def forward(norm, x):
        groups = x.unflatten(1, (norm.num_groups, -1))                              # (B, G, C/G, h, w)
        if norm not in moments:
            moments[norm] = torch.var_mean(groups, dim=(0, 2, 3, 4), correction=0, keepdim=True)
        var, mean = moments[norm]
        x = ((groups - mean) * (var + norm.eps).rsqrt()).flatten(1, 2)
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    for norm in norms:
        norm.forward = partial(forward, norm)
    try:
        if norms:
            look()
        yield
    finally:
        for norm in norms:
            del norm.forward


def restore(pictures, size, names, vosr, tile, batch, steps, seed, cfg_scale, alpha, color, fidelity,
            posterior, progress):
    """RGB pictures of one size -> restored ones of `size`; several only if a tile holds them.
    The enlarged input exists in windows alone, the output as 8 bits in Pillow; latents are whole, a byte per
    pixel each. FloatingPointError if a value is not finite."""
    device, half = next(vosr.parameters()).device, vosr.half
    rows, cols = (reflect(n, 0, max(64, -(-n // GRID) * GRID) - n) for n in size[::-1])
    height, width = len(rows) // 8, len(cols) // 8                                          # of the latent
    tile = tile // GRID * 2 or max(height, width)                                           # in cells, even
    h, w = min(tile, height), min(tile, width)
    places = list(itertools.product(tile_layout(height, h, h // 8), tile_layout(width, w, w // 8)))
    shape, keys = (1, vosr.dit.channels, height, width), [data.keyed_generator("cpu", seed, n) for n in names]
    noise = torch.cat([torch.randn(shape, generator=key) for key in keys]).to(device)
    drawn = posterior == "sample" and torch.cat([torch.randn(shape, generator=k) for k in keys]).to(device)

    def crop(top, left, h, w):  # latent cells -> (n, 3, 8h, 8w) in [-1, 1], enlarged by bicubic
        y, x = rows[8 * top:8 * (top + h)], cols[8 * left:8 * (left + w)]
        first, end = np.array([x.min(), y.min()]), np.array([x.max(), y.max()]) + 1
        box = [float(n) for ends in (first, end) for n in ends * pictures[0].size / size]  # in the input
        windows = (p.resize(tuple(end - first), Image.Resampling.BICUBIC, box) for p in pictures)
        pixels = np.stack([np.asarray(window)[np.ix_(y - first[1], x - first[0])] for window in windows])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device) / 127.5 - 1

    @lru_cache(maxsize=64 if steps > 1 else 1)  # a single step needs the tokens of a tile once
    def tokens(k):  # number of a tile -> (n, N, enc_dim)
        return vosr.semantic_tokens(crop(*places[k], h, w)).float()

    def encode(top, left, h, w):  # -> (n, C, h, w)
        part = None if drawn is False else drawn[..., top:top + h, left:left + w]
        return vosr.encode(crop(top, left, h, w), part)

    def semantics(some):  # numbers of tiles
        with torch.autocast(device.type, half, enabled=half is not None):
            return vosr.dit.semantics(torch.cat([tokens(k) for k in some]))

    def net(z, t, c_str, c_sem, r=None):
        with torch.autocast(device.type, half, enabled=half is not None):
            v = vosr.velocity(z, t, c_str, c_sem, r if vosr.dit.cfg.auxiliary_time_cond else None)
        bar.update(len(z))
        return v

    def latent(top, left, h, w):
        return z[..., top:top + h, left:left + w]

    def paint(top, left, h, w):  # -> grey levels (n, 3, 8h, 8w)
        images = vosr.decode(z_tile := latent(top, left, h, w))
        if not (z_tile.isfinite().all() and images.isfinite().all()):
            raise FloatingPointError("the result is not finite")
        images = (images * 0.5 + 0.5).clamp(0, 1)
        if color == "wavelet":
            references = crop(top, left, h, w) * 0.5 + 0.5
            images = torch.stack([wavelet(*pair) for pair in zip(images, references, strict=True)])
        return 255 * images

    def spread(cut):  # 16 windows all over the picture, together as large as a tile
        rows, cols = (min(n, max(8, tile // 4)) for n in (height, width))
        ys, xs = (np.linspace(0, n - m, 4).astype(int).tolist() for n, m in ((height, rows), (width, cols)))
        return torch.cat([cut(y, x, rows, cols) for y in ys for x in xs])

    with shared_norms(vosr.vae, places[1:] and (lambda: vosr.encode(spread(crop)))):
        c_str = torch.cat([band for _, band in assemble(encode, height, width, tile)], dim=-2)
    cfg_scale = vosr.defaults["cfg_scale"] if vosr.one_step or cfg_scale is None else cfg_scale
    alpha = 0.0 if vosr.args.get("guidance") == "uncond" else alpha
    total = steps * len(places) * len(pictures) * (1 if cfg_scale in (None, 1) else 2)
    with tqdm(total=total, disable=None if progress else True, leave=False) as bar:
        kept = cache(semantics) if steps > 1 and len(places) <= KEPT_TILES else semantics
        field, c_sem = (tiled(net, places, h, w, kept, batch), []) if places[1:] else (net, semantics([0]))
        noise *= vosr.tau * (1 - fidelity)
        z = euler(field, noise, c_str, c_sem, time_grid(steps), alpha, cfg_scale)
    del c_str, noise  # a large picture may need their place
    results = [Image.new("RGB", size) for _ in pictures]
    with shared_norms(vosr.vae, places[1:] and (lambda: vosr.decode(spread(latent)))):
        for top, band in assemble(paint, height, width, tile):
            levels = band.add_(0.5).clamp_(0, 255).byte().permute(0, 2, 3, 1).cpu().contiguous()  # half up
            for result, part in zip(results, levels.numpy(), strict=True):
                result.paste(Image.fromarray(part), (0, top))
    if color == "adain":
        for k, picture in enumerate(pictures):
            levels = adain(results[k], picture.resize(size, Image.Resampling.BICUBIC)) * 255 + 0.5
            results[k] = results[k].point(levels.int().flatten().tolist())
    return results


def free_memory(device):
    """Bytes; plenty where it is not known."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    about = Path("/proc/meminfo").read_text() if sys.platform == "linux" else "MemAvailable: 999999999999"
    return 1024 * int(re.search(r"MemAvailable: *(\d+)", about)[1])


def retry(pictures, size, names, vosr, tile, options):
    """restore all, with as much at a time as free memory holds; again in fp32 if a value is not finite.

    On a CPU one tile at a time: more are not faster, and a picture is the same, alone or among others."""
    device, bundle, exact, done = next(vosr.parameters()).device, vosr, False, []
    pixels = math.prod(min(tile or side, side) for side in size)  # of a tile; then bytes, at the peak
    tiles = free_memory(device) / pixels / (1_000 if vosr.dit.cfg.ae_type == "tiny" else 7_000)
    batch = min(8, max(1, int(tiles / 2))) if device.type == "cuda" else 1
    if tiles < 1 and pixels > 128**2:
        tile = max(128, int((pixels * tiles) ** 0.5))
        print(f"{names[0]}: little memory is free, --tile {tile}", file=sys.stderr)
    while len(done) < len(pictures):
        alone = tile and max(size) > tile // GRID * GRID
        some = slice(len(done), len(done) + (1 if alone else batch))
        try:
            bundle = in_fp32(vosr) if exact else vosr
            done += restore(pictures[some], size, names[some], bundle, tile, batch, *options)
            exact = False
        except FloatingPointError as reason:
            if bundle.half is None:
                raise
            print(f"{names[some]}: {reason} in {vosr.half}, computed again in fp32", file=sys.stderr)
            exact = True
        except (MemoryError, RuntimeError) as reason:
            if isinstance(reason, RuntimeError) and not re.search("(?i)of mem|enough mem|alloc", str(reason)):
                raise
            tile = min(tile or max(size), max(size))
            if tile <= 128 and batch == 1:
                raise MemoryError("out of memory") from None
            tile, batch = (tile, batch // 2) if batch > 1 else (max(128, tile // 2), 1)
            print(f"{names[0]}: out of memory, again with --tile {tile}, {batch} at a time", file=sys.stderr)
    return done


def passes(size, wanted):
    """The sizes on the way from size to wanted, (width, height) each: at most x4 at a time, at least one."""
    while True:
        size = tuple(min(new, 4 * old) for new, old in zip(wanted, size, strict=True))
        yield size
        if size == wanted:
            return


@torch.no_grad()
def upscale(image, vosr, scale=4, steps=0, seed=42, name="image", cfg_scale=None, alpha=0.1, tile=512,
            color="wavelet", fidelity=0.0, posterior="mode", size=None, progress=False):
    """Picture -> picture of round(scale * side) pixels, or of size = (width, height); any side from 1.
    image: PIL, or a tensor (3, H, W) in [0, 1], or a list of them, all of one size, with a list of names; the
    result is of the same kind. vosr comes from `load`, the options are those of the command line. Beyond x4
    it takes several passes. (seed, name) decide the noise; sampling starts from tau (1 - fidelity) noise,
    where tau is the model's own; cfg_scale (None: the model's own) and alpha act in multi-step models only
    (Eq. 2). Transparency is enlarged by bicubic. Raises ValueError."""
    images, names = (image, name) if isinstance(image, list) else ([image], [name])
    wrong = any(torch.is_tensor(i) and (i.shape[:-2] != (3,) or not i.is_floating_point()) for i in images)
    if wrong or color not in COLORS:
        raise ValueError(f"upscale takes PIL or float tensors (3, H, W), and color {', '.join(COLORS)}")
    parts = [data.split_picture(data.to_pillow(i) if torch.is_tensor(i) else i) for i in images]
    pictures, results = [part.rgb for part in parts], []
    if len({p.size for p in pictures}) > 1 or isinstance(names, str) or len(names) != len(images):
        raise ValueError("pictures that are enlarged together have one size, and a name each")
    size = tuple(size or (max(1, round(scale * side)) for side in pictures[0].size))
    options = (steps or vosr.defaults["steps"], seed, cfg_scale, alpha, color, fidelity, posterior, progress)
    for wanted in passes(pictures[0].size, size):
        pictures = retry(pictures, wanted, names, vosr, tile, options)
    for rgb, part, given in zip(pictures, parts, images, strict=True):
        result = rgb.convert("L") if part.grey else rgb
        if part.alpha:
            result.putalpha(part.alpha.resize(size, Image.Resampling.BICUBIC))
        result.info = dict(icc_profile=part.icc, notes=part.notes)
        if torch.is_tensor(given):
            result = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).to(given.device) / 255
        results.append(result)
    return results if isinstance(image, list) else results[0]


# ---------------------------------------------------------------- models
def ready(vosr, args=None, half=None, device="auto", source=None):
    """Put a bundle on its device, in eval mode, and note as attributes how it wants to be sampled.
    args: the args.json of its DiT, whose folder is `source`; half: dtype of products and attention in DiT and
    semantic encoder, None: fp32. one_step: a student, no guidance. tau: amplitude of its starting noise."""
    vosr.args, vosr.half, vosr.source = args or {}, half, source
    vosr.one_step = vosr.dit.cfg.auxiliary_time_cond or vosr.args.get("distill_type") == "onestep"
    vosr.tau, ae_type = float(vosr.args.get("tau") or 1), vosr.dit.cfg.ae_type
    vosr.defaults = next(row for row in DEFAULTS.values()
                         if row["ae_type"] == ae_type and (row["steps"] == 1) == vosr.one_step)
    if vosr.args.get("guidance") == "full":  # no other branch was trained
        vosr.defaults = vosr.defaults | dict(cfg_scale=1.0 if vosr.defaults["cfg_scale"] else None)
    return vosr.eval().requires_grad_(False).to(choose_device(device))


def in_fp32(vosr):
    """The same bundle in fp32; weights that were rounded on loading are read again."""
    dit, device = load_dit(vosr.source) if vosr.source else vosr.dit, next(vosr.parameters()).device
    return ready(VOSR(dit, vosr.vae, vosr.semantic_encoder), vosr.args, None, str(device), vosr.source)


def find_model(model, steps, weights):
    """--model and --steps -> folder of the DiT, and its name in DEFAULTS, "" for the user's own folder."""
    name = model if f"{model}-ms" not in DEFAULTS else f"{model}-os" if steps <= 4 else f"{model}-ms"
    if name in DEFAULTS:
        return Path(weights, DEFAULTS[name]["folder"]), name
    if not Path(model).exists():
        raise ValueError(f"unknown model {model!r}: {', '.join(FAMILIES)}, or with -ms or -os at the end, "
                         "or a folder that holds args.json and weights")
    return Path(model), ""


AROUND = {  # files of the networks around a published DiT, below the weights folder
    ae_type: (f"{vae}/config.json", f"{vae}/diffusion_pytorch_model.safetensors",
              *(["sd21_lwdecoder.pth"] if ae_type == "sd2" else []), encoder)
    for ae_type, (vae, encoder) in FROZEN.items() if ae_type != "tiny"}


def published_files(model):
    """Family or network -> its files below the weights folder, in the authors' layout; none of tiny."""
    rows = [row for name, row in DEFAULTS.items() if model in (name, re.sub("-[mo]s$", "", name))]
    if not rows:
        raise ValueError(f"unknown model {model!r}: {', '.join(FAMILIES)}, or with -ms or -os at the end")
    return tuple(dict.fromkeys(file for row in rows if row["ae_type"] in AROUND for file in (
        f"{row['folder']}/args.json", f"{row['folder']}/checkpoints/ema_model.safetensors",
        *AROUND[row["ae_type"]])))


def require(files, weights, model):
    """Raises ValueError that names all files which are not in the weights folder, and how to get them."""
    def there(file):  # a DiT may lie where find_weights looks for it
        subs = ("checkpoints", "clean_weights", ".")
        return any(Path(weights, file.replace("checkpoints/ema", f"{s}/ema")).is_file() for s in subs)

    if missing := [str(Path(weights, file)) for file in files if not there(file)]:
        elsewhere = "" if str(weights) == "weights" else f" --weights {weights}"
        raise ValueError(f"missing: {', '.join(missing)}; `python tools/download.py {model}{elsewhere}` gets "
                         f"them; or put them there by hand, they have the same names at {HUB}")


def load(model="tiny", steps=1, weights="weights", dtype="auto", device="auto"):
    """Family, network or folder, also of a run -> VOSR, ready to sample; steps choose one of a family's two
    networks. Raises ValueError that lists all missing files."""
    folder, name = find_model(model, steps, weights)
    require(published_files(name) if name else (), weights, name)
    (path, args), row = read_settings(folder), DEFAULTS.get(name, {})
    torch.backends.cudnn.allow_tf32 = dtype != "fp32"  # PyTorch's default rounds convolutions to 10 bits
    half = HALF[dtype if dtype != "auto" else "fp16" if choose_device(device).type == "cuda" else "fp32"]
    ae_type, wanted = args.get("ae_type"), [row["ae_type"]] if row else list(FROZEN)
    if ae_type not in wanted:
        raise ValueError(f"{path} has ae_type {ae_type!r}, not {' or '.join(wanted)}")
    beside = AROUND.get(ae_type, ())[:None if args.get("semantics", True) else -1]
    require(beside, weights, "0.5B" if ae_type == "sd2" else "2.0")
    dit = load_dit(folder, half)
    around = load_frozen(dit.cfg, weights, None if name else folder, light=True)
    vosr = ready(VOSR(dit, *around), args, half, device, folder)
    if name and (vosr.one_step, dit.cfg.auxiliary_time_cond) != (row["steps"] == 1, name.endswith("-os")):
        raise ValueError(f"{folder} holds a {'one' if vosr.one_step else 'multi'}-step one, unlike {name}")
    return vosr


# ---------------------------------------------------------------- command line
def check(cfg):
    """Wrong values end here, before anything is loaded."""
    validate(cfg, color=COLORS, posterior=("mode", "sample"), dtype=("auto", *HALF),
             ext=("png", "jpg", "webp", "tif"))
    for name, low, high in (("steps", 0, 1000), ("scale", 1, 100), ("long", 0, 10**6), ("fidelity", 0, 1),
                            ("alpha", 0, 1), ("tile", 64 if cfg.tile else 0, 10**6), ("max_pixels", 1, 1e12)):
        if not low <= getattr(cfg, name) <= high:
            die(f"--{name} lies between {low} and {high}, got {getattr(cfg, name):g}")
    if cfg.size and not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", cfg.size):
        die(f"--size wants WIDTHxHEIGHT such as 1920x1080, got {cfg.size!r}")
    if (cfg.scale != 4) + bool(cfg.size) + bool(cfg.long) > 1:
        die("--scale, --size and --long exclude each other")
    if Path(cfg.out).suffix.lower() in data.SUFFIXES or Path(cfg.out).is_file():
        die(f"--out wants a folder, got {cfg.out}")
    if not cfg.inputs:
        die("no input: name pictures or folders, as in python sample.py input.png; --help lists the options")


def plan(cfg):
    """The call as a list of (source, target); clashes end it before work starts."""
    ending = f"_{cfg.size}" if cfg.size else f"_long{cfg.long}" if cfg.long else f"_x{cfg.scale:g}"
    jobs = {}  # absolute source -> (source, target): a file that is named twice is one job
    words = ([w] if Path(w).exists() else sorted(glob(w, recursive=True)) or [w] for w in cfg.inputs)
    for word in map(Path, itertools.chain(*words)):
        found = [word] if word.exists() or len(cfg.inputs) > 1 else die(f"{word} does not exist")
        if word.is_dir():
            found = data.pictures_in(word) or die(f"{word} holds no pictures ({', '.join(data.SUFFIXES)})")
        for p in found:
            inside = p.relative_to(word).parent if word.is_dir() else ""
            folder = Path(cfg.out, inside) if cfg.out else p.parent
            jobs.setdefault(p.absolute(), (p, folder / f"{p.stem}{ending}.{cfg.ext}"))
    targets = {target.absolute() for _, target in jobs.values()}
    for path in jobs.keys() & targets:  # results of an earlier call that lie among the inputs
        if cfg.overwrite and jobs[path][0] in map(Path, cfg.inputs):
            die(f"{jobs[path][0]} is an input and would be overwritten; name another folder with -o")
        del jobs[path]
    made = {}
    for source, target in jobs.values():
        if made.setdefault(target.absolute(), source) != source:
            die(f"{made[target.absolute()]} and {source} would both become {target}; rename one of them")
    return list(jobs.values())


def opened(source, target, cfg):
    """-> (source, target, picture, size of the output). ValueError, before any work, if it cannot be made."""
    image = data.open_picture(source, cfg.max_pixels)
    scale = cfg.long / max(image.size) if cfg.long else cfg.scale
    size = tuple(map(int, cfg.size.split("x")) if cfg.size else (round(scale * n) or 1 for n in image.size))
    if any(map(int.__lt__, size, image.size)):
        raise ValueError(f"{source} is {image.width}x{image.height}: {cfg.size or cfg.long} would shrink it")
    data.check_format(target, size)
    if (need := 8 * math.prod(size)) > (free := free_memory(torch.device("cpu"))):  # output and latents
        raise ValueError(f"{source}: {size[0]}x{size[1]} take {need / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    return source, target, image, size


def run(jobs, vosr, cfg):
    """Pictures of one size, from files to files; prints a line for each and takes it off the list `jobs`."""
    start, (sources, _, images, _) = time.perf_counter(), zip(*jobs, strict=True)
    pictures = upscale(list(images), vosr, 0, cfg.steps, cfg.seed, [s.name for s in sources], cfg.cfg_scale,
                       cfg.alpha, cfg.tile, cfg.color, cfg.fidelity, cfg.posterior, jobs[0][3], True)
    seconds = (time.perf_counter() - start) / len(jobs)
    for picture in pictures:
        source, target, image, _ = jobs[0]
        for note in picture.info["notes"]:
            print(f"{source}: {note}")
        rgb, opacity, grey, icc, _ = data.split_picture(picture)
        data.write_image(target, rgb, opacity, grey, None if cfg.strip else icc)
        print(f"{source}  {image.width}x{image.height} -> {picture.width}x{picture.height}  "
              f"{cfg.steps} step{'s' * (cfg.steps > 1)}  {seconds:.2f} s  {target}", flush=True)
        del jobs[0]


def main():
    cfg = cli(Config)
    check(cfg)
    jobs, _ = plan(cfg), find_model(cfg.model, cfg.steps, cfg.weights)  # or ValueError
    todo = [(s, t) for s, t in jobs if cfg.overwrite or not (t.is_file() and t.stat().st_size)]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} outputs exist, by any model; --overwrite redoes them")
    for folder in {target.parent for source, target in todo if source.exists()}:
        if not folder.resolve().is_relative_to(Path(cfg.out or folder).resolve()):  # by a link in it
            die(f"{folder} leads out of {cfg.out}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        except OSError as reason:
            die(f"{folder} is not writable ({reason.strerror}); name another folder with -o")
    if not todo:
        return
    vosr = load(cfg.model, cfg.steps, cfg.weights, cfg.dtype, cfg.device)
    cfg.steps = cfg.steps or vosr.defaults["steps"]
    for block in vosr.dit.blocks if cfg.compile else ():
        block.compile()
    if math.isnan(cfg.cfg_scale):
        cfg.cfg_scale = vosr.defaults["cfg_scale"]
    elif vosr.one_step:
        print("--cfg_scale changes nothing: a one-step network has it built in; try --fidelity")
    failed, batch = [], 8 if next(vosr.parameters()).is_cuda else 1

    @contextmanager
    def others_go_on(source):
        try:
            yield
        except (ValueError, OSError, FloatingPointError, MemoryError) as reason:
            reason = str(reason) if str(source) in str(reason) else f"{source}: {reason}"
            if len(jobs) == 1:
                die(reason)
            print("error:", reason, file=sys.stderr)
            failed.append(str(source))

    def pictures():
        for job in todo:
            with others_go_on(job[0]):
                yield opened(*job, cfg)

    for (_, size), alike in itertools.groupby(pictures(), key=lambda job: (job[2].size, job[3])):
        while group := list(itertools.islice(alike, batch if max(size) <= cfg.tile else 1)):
            if len(group) > 1:
                with suppress(ValueError, OSError, FloatingPointError, MemoryError):
                    run(group, vosr, cfg)
            for job in list(group):  # alone, or left over because one of the group fails
                with others_go_on(job[0]):
                    run([job], vosr, cfg)
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
