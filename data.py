"""Pictures in and out, the degradation that makes LR from HR, and where training pictures come from.

    python data.py show photos/                         # contact_sheet.png: HR | LR | what was drawn
    python data.py show procedural --degradation mild   # pictures that need no download, milder

Pixels are float32 in [0, 1] except where uint8 is written. The degradation is Real-ESRGAN's two stages of
blur, resize, noise and JPEG as VOSR uses them, but each sample has its own draws, not each batch.
"""
import bisect
import cmath
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import struct
import tarfile
import threading
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# ---------------------------------------------------------------- settings
# Pairs are ranges of uniform draws; rows of `kernels` and `resize` are (value, share of samples).
KERNEL_SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
BETA = dict(generalized=((0.5, 1.0), (1.0, 4.0)), plateau=((1.0, 1.0), (1.0, 2.0)))  # one of two ranges
FIRST = dict(  # Real-ESRGAN's ranges, which VOSR uses unchanged
    blur=1.0,  # share of samples that are blurred
    kernels=(("iso", 0.405), ("aniso", 0.225), ("generalized_iso", 0.108), ("generalized_aniso", 0.027),
             ("plateau_iso", 0.108), ("plateau_aniso", 0.027), ("sinc", 0.1)),
    sigma=(0.2, 3.0),  # of the blur, in pixels
    resize=(((1.0, 1.5), 0.2), ((0.15, 1.0), 0.7), ((1.0, 1.0), 0.1)),  # None: straight to the LR size
    modes=("area", "bilinear", "bicubic"),
    gaussian=0.5,  # share of Gaussian noise, the rest is Poisson noise
    gaussian_sigma=(1.0, 30.0),  # in levels of 255
    poisson_scale=(0.05, 3.0),  # 1: about as many photons as the picture has grey levels
    gray=0.4,  # share of noise without colour
    jpeg=(30.0, 95.0),  # quality
)
SECOND = FIRST | dict(blur=0.8, sigma=(0.2, 1.5), gaussian_sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5),
                      resize=(((1.0, 1.2), 0.3), ((0.3, 1.0), 0.4), ((1.0, 1.0), 0.3)))
ONLY = FIRST | dict(kernels=(("iso", 0.7), ("aniso", 0.3)), sigma=(0.2, 2.0), resize=None,
                    modes=("area", "area", "bilinear", "bicubic"), gaussian=1.0, gaussian_sigma=(0.0, 6.0),
                    jpeg=(60.0, 96.0))
DEGRADATIONS = {  # sinc: share of samples with a final sinc filter; back: how LR is enlarged again
    "full": dict(stages=(FIRST, SECOND), sinc=0.8, back=FIRST["modes"]),
    "mild": dict(stages=(ONLY,), sinc=0.0, back=("bicubic",)),  # a fair camera and a fair JPEG
}


# ---------------------------------------------------------------- image files
MAX_PIXELS = 200_000_000  # larger pictures are refused by their header
LONGEST_SIDE = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}  # that the encoders can write
Picture = namedtuple("Picture", "rgb alpha grey icc notes")  # see split_picture
reading = threading.Lock()
BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, TypeError, struct.error,
          Image.DecompressionBombError)  # what Pillow raises at a broken file


def keyed_generator(device, *key):
    """Generator whose numbers depend on `key` alone (ints, strings): same key, same numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits


def is_deep(image):
    """Whether it is 16-bit grey, which Pillow may hold in 32 bits. ValueError if the range is unknown."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"pixels of unknown range, mode {image.mode}; 8 and 16 bits per channel work")
    return image.mode.startswith("I")


def open_picture(path, max_pixels=MAX_PIXELS, content=None):
    """Image file, or its content -> PIL image: first frame, decoded, upright. ValueError names the file."""
    with reading:  # Pillow's own limit is a global, and too low: it warns at 89 million pixels
        known, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path if content is None else io.BytesIO(content)) as picture:
                width, height = picture.size
                if width * height <= max_pixels:
                    Image.MAX_IMAGE_PIXELS = max_pixels  # for formats that hold pictures of other formats
                    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
                    picture.stored = frames, str(picture.tile)  # lost by decoding; MPO: extras of a phone
                    is_deep(picture)  # or ValueError
                    ImageOps.exif_transpose(picture, in_place=True)
                    return picture
            wrong = f"has {width}x{height} pixels, the limit is {max_pixels}; --max_pixels N allows more"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            wrong = "is a folder" if os.path.isdir(path) else "does not exist"
        except BROKEN as reason:
            reason = "it is empty" if os.path.isfile(path) and not os.path.getsize(path) else reason
            wrong = f"is not an image that can be read; PNG, JPEG, WebP work ({reason})"
        finally:
            Image.MAX_IMAGE_PIXELS = known
    raise ValueError(re.sub("<_io.*?>", "it", f"{path} {wrong}"))  # no address of a content


def split_picture(image):
    """PIL image of any mode -> Picture, upright, 8 bits per channel. ValueError for pixels of unknown range.
    rgb: RGB, may be `image` itself; alpha: L, or None; grey: whether it had no colours; icc: its profile if
    that describes RGB, or grey pixels; notes: for the user, what else was done to it."""
    frames, packing = getattr(image, "stored", (1, str(getattr(image, "tile", ""))))
    deep, icc = is_deep(image), image.info.get("icc_profile")
    notes = [f"first of {frames} frames"] if frames > 1 else []
    if deep or ";16" in packing:  # colours were reduced by Pillow
        notes.append("16 bits per channel become 8")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    if deep:  # level / 257, rounded, where 65408 and more are 255, too; Pillow would clip at 255
        image = Image.fromarray(((np.minimum(np.asarray(image), 65407) + 128) // 257).astype(np.uint8))
    if image.mode == "CMYK":
        from PIL import ImageCms  # LittleCMS is an optional part of Pillow
        try:
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, io.BytesIO(icc), srgb, outputMode="RGB")
            notes.append("CMYK converted to sRGB by its profile")
        except (ImportError, ImageCms.PyCMSError):
            notes.append("CMYK without a profile that works, converted naively")
    grey, alpha = image.mode in ("1", "L", "LA", "La") or "LA;16" in packing, None
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = image.getchannel("A")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    others = {b"GRAY", b"RGB ", b"CMYK"} - {b"GRAY" if grey else b"RGB "}
    return Picture(rgb, alpha, grey, None if icc and icc[16:20] in others else icc, tuple(notes))


def on_white(rgb, alpha):
    """RGB picture seen through alpha, L or None, on white paper."""
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def read_levels(path, content=None):
    """Image file, or its content -> uint8 (3, H, W): upright, alpha on white, grey repeated."""
    rgb, alpha, *_ = split_picture(open_picture(path, content=content))
    return torch.from_numpy(np.array(on_white(rgb, alpha))).permute(2, 0, 1)


def read_image(path):
    """The same as float32 (3, H, W) in [0, 1]."""
    return read_levels(path).contiguous() / 255


def to_pillow(image):
    """(3, H, W) float in [0, 1] -> 8-bit PIL image; clamped, rounded half up."""
    levels = (image.detach().float().cpu() * 255 + 0.5).floor().clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def write_whole(path, write):
    """write(hidden) makes a file or folder beside `path`, flushed and renamed: nobody sees half of it."""
    hidden = (path := Path(path)).with_name(f".half.{os.getpid()}.{path.name}")
    try:
        write(hidden)
        for part in hidden.iterdir() if hidden.is_dir() else [hidden]:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        if hidden.is_dir():  # only a folder may replace a folder
            shutil.rmtree(path, ignore_errors=True)
        os.replace(hidden, path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.unlink(missing_ok=True)


def check_format(path, size):
    """-> suffix of the path, in small letters. ValueError if its format cannot hold a picture of `size`."""
    suffix = Path(path).suffix.lower()
    if max(size) > (longest := LONGEST_SIDE.get(suffix, math.inf)):
        raise ValueError(f"{path}: {max(size)} px a side, {suffix} has {longest} at most; PNG has more")
    return suffix


def write_image(path, image, alpha=None, grey=False, icc=None):
    """Write RGB, or (3, H, W) in [0, 1], as L if grey, with alpha (L; JPEG: on white), in the format of the
    extension. ValueError."""
    rgb = to_pillow(image) if torch.is_tensor(image) else image
    suffix = check_format(path, rgb.size)
    if suffix in (".jpg", ".jpeg"):
        rgb, alpha = on_white(rgb, alpha), None
    picture = rgb.convert("L") if grey else rgb
    if alpha is not None:
        picture = picture.copy()  # putalpha works in place
        picture.putalpha(alpha)
    icc = None if grey and suffix == ".webp" else icc  # WebP stores grey as RGB
    write_whole(path, lambda hidden: picture.save(hidden, icc_profile=icc, quality=95, subsampling="4:4:4"))


# ---------------------------------------------------------------- operations of the degradation
# Samples of a batch may differ in size: b fills the upper left sizes[b] = (h, w) of the canvas (B, 3, H, W),
# what lies outside is never read. sizes = None: all fill it.

def on(device, values):
    """List or tensor -> tensor on the device; the processor does not wait for a GPU."""
    values = torch.as_tensor(values)
    values = values.pin_memory() if device.type == "cuda" and not values.is_cuda else values
    return values.to(device, non_blocking=True)


def outside(image, sizes):
    """Mask (B, 1, H, W) of the pixels that belong to no sample; None if there are none."""
    if sizes is None or all(size == tuple(image.shape[-2:]) for size in sizes):
        return None
    extent = on(image.device, sizes)  # (B, 2)
    row, column = (torch.arange(n, device=image.device) for n in image.shape[-2:])
    return ((row >= extent[:, :1])[:, :, None] | (column >= extent[:, 1:])[:, None, :])[:, None]


def blur_kernel(kind, size, sigma_x=1.0, sigma_y=1.0, theta=0.0, beta=1.0, cutoff=1.0):
    """One kernel of Real-ESRGAN's mixture, computed in float64 -> (size, size) float32, sum 1.
    Kinds: iso exp(-d^2 / 2), generalized_iso exp(-d^(2 beta) / 2), plateau_iso 1 / (1 + d^(2 beta)), all with
    sigma_x alone; with aniso for iso, along axes turned by theta. sinc: the circular low-pass
    w J1(w r) / (2 pi r), w = cutoff in radians per pixel."""
    x = np.arange(size) - (size - 1) / 2
    y = x[:, None]
    if kind == "sinc":
        r = torch.from_numpy(np.hypot(x, y)).clamp(min=1e-9)  # the limit at 0 to all digits
        kernel = (cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)).numpy()
    else:
        if not kind.endswith("aniso"):
            sigma_y, theta = sigma_x, 0.0
        x, y = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
        d2 = (x / sigma_x) ** 2 + (y / sigma_y) ** 2
        if kind.startswith(("generalized", "plateau")):
            d2 = d2**beta
        kernel = 1 / (1 + d2) if kind.startswith("plateau") else np.exp(-0.5 * d2)
    return torch.from_numpy((kernel / kernel.sum()).astype(np.float32))


@functools.lru_cache(maxsize=4096)
def fast_length(n):
    """Smallest 2^a 3^b 5^c that is at least n: the FFT is fast there."""
    odd = (3**b * 5**c for b in range(8) for c in range(6))
    return min(m * 2 ** max(0, math.ceil(math.log2(n / m))) for m in odd)


def reflect(image, pad, sizes):
    """Reflect each sample at its edges (edge not repeated) -> (B, 3, H + 2 pad, W + 2 pad)."""
    if pad < min(image.shape[-2:]) and set(sizes) == {tuple(image.shape[-2:])}:
        return F.pad(image, [pad] * 4, mode="reflect")  # several times as fast
    for dim in (2, 3):  # where pad exceeds a side the reflection repeats: every size from 1 px works
        period = on(image.device, [max(2 * size[dim - 2] - 2, 1) for size in sizes])[:, None]
        index = torch.arange(-pad, image.shape[dim] + pad, device=image.device) % period  # (B, n + 2 pad)
        index = torch.minimum(index, period - index)
        index = index[:, None, :, None] if dim == 2 else index[:, None, None]
        image = image.gather(dim, index.expand(*image.shape[:dim], -1, *image.shape[dim + 1 :]))
    return image


def blur(image, kernels, sizes=None):
    """Cross-correlation of image (B, 3, H, W) with kernels (B, k, k), one per sample; reflecting edges."""
    (B, C, H, W), k, kernels = image.shape, kernels.shape[-1], on(image.device, kernels)
    padded = reflect(image, k // 2, sizes or [(H, W)])
    if k <= 7 and not image.is_cuda:  # below about 9 x 9 the direct sum is faster than the FFT
        weight, planes = kernels.repeat_interleave(C, dim=0)[:, None], padded.flatten(0, 1)[None]
        return F.conv2d(planes, weight, groups=B * C).view(image.shape)
    shape = [fast_length(n) for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=shape) * torch.fft.rfft2(kernels, s=shape).conj()[:, None]
    return torch.fft.irfft2(spectrum, s=shape)[..., :H, :W].contiguous()


def axis_matrix(n, axis, draw, device):
    """Matrix (n', n) that resizes an axis of n pixels as PyTorch does a picture; `draw` as for resize."""
    wanted = draw["size"][axis] if "size" in draw else math.floor(n * draw["scale_factor"])
    if draw["mode"] == "area":  # mean of all pixels that the new one touches
        old, new = torch.arange(n, device=device), torch.arange(wanted, device=device)[:, None]
        touched = (old >= new * n // wanted) & (old <= ((new + 1) * n - 1) // wanted)
        return touched / touched.sum(dim=1, keepdim=True)
    unit = torch.eye(n, device=device)[None, None]
    call = dict(size=(wanted, n)) if "size" in draw else dict(scale_factor=(draw["scale_factor"], 1.0))
    return F.interpolate(unit, **call, mode=draw["mode"])[0, 0]  # what becomes of the unit matrix


def resize(image, draws, sizes=None):
    """Resize each sample as PyTorch's interpolate does (align_corners False) -> image and its new sizes.
    A draw is dict(mode, size=(h, w)), or dict(mode, scale_factor), whose grid follows the factor itself and
    not the rounded size, or None, which keeps the sample."""
    sizes, targets = sizes or [tuple(image.shape[-2:])] * len(image), []
    pairs = [(d or dict(mode="area", size=s), s) for d, s in zip(draws, sizes, strict=True)]
    if all(d.get("scale_factor", 1) == 1 and d.get("size", s) == s for d, s in pairs):
        return image, sizes
    if len(image) == 1 and pairs[0][0]["mode"] != "area" and pairs[0][0].get("scale_factor", 2) < 1:
        image = F.interpolate(image, scale_factor=pairs[0][0]["scale_factor"], mode=pairs[0][0]["mode"])
        return image, [tuple(image.shape[-2:])]  # faster than matrices where it gets smaller
    for axis, length in enumerate(image.shape[-2:]):
        parts = [axis_matrix(size[axis], axis, draw, image.device) for draw, size in pairs]
        rows = max(map(len, parts))
        matrix = torch.stack([F.pad(p, (0, length - p.shape[1], 0, rows - len(p))) for p in parts])
        image = matrix[:, None] @ image if axis == 0 else image @ matrix[:, None].mT
        targets.append([len(part) for part in parts])
    return image, list(zip(*targets, strict=True))


def luma(image):
    """(B, 3, H, W) -> (B, 1, H, W), the weights of torchvision's rgb_to_grayscale."""
    return 0.2989 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]


def gaussian_noise(image, sigma, noise):
    """Add noise (standard normal, (B, 3, H, W); gray: one channel) times sigma (B,) levels of 255."""
    return (image + noise * (sigma / 255).view(-1, 1, 1, 1)).clamp(0, 1)


def poisson_base(image, sizes=None):
    """The 8-bit image q (B, C, H, W); v (B, 1, 1, 1), its number of distinct values up to a power of two."""
    levels, beyond = (image * 255).round().clamp(0, 255), outside(image, sizes)
    bins = levels.long() if beyond is None else levels.long().masked_fill(beyond, 256)
    seen = torch.zeros(len(image), 257, device=image.device).scatter_(1, bins.flatten(1), 1.0)
    return levels / 255, torch.exp2(seen[:, :256].sum(dim=1).log2().ceil()).view(-1, 1, 1, 1)


def poisson_noise(image, scale, poisson, gray=False, sizes=None):
    """Add shot noise times scale (B,). poisson(rate) draws counts: (B, 3, H, W), or (B, 1, H, W) if gray."""
    q, v = poisson_base(luma(image) if gray else image, sizes)
    noise = poisson(q * v) / v - q
    return (image + noise * scale.view(-1, 1, 1, 1)).clamp(0, 1)


LUMA_TABLE = torch.tensor([  # the usual one transposed, as in the differentiable JPEG of Real-ESRGAN
    [16, 12, 14, 14, 18, 24, 49, 72], [11, 12, 13, 17, 22, 35, 64, 92], [10, 14, 16, 22, 37, 55, 78, 95],
    [16, 19, 24, 29, 56, 64, 87, 98], [24, 26, 40, 51, 68, 81, 103, 112],
    [40, 58, 57, 87, 109, 104, 121, 100], [51, 60, 69, 80, 103, 113, 120, 103],
    [61, 55, 56, 62, 77, 92, 101, 99.0]])
CHROMA_TABLE = F.pad(torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99.0]]),
                     (0, 4, 0, 4), value=99.0)
TO_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
TO_RGB = torch.tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
COSINES = np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
COSINES[0] /= 2**0.5
DCT = torch.from_numpy(np.kron(COSINES, COSINES)).float()  # (64, 64): row 8 u + v is the picture of u, v


def quantise(plane, table, factor):
    """Round the coefficients of the 8x8 DCT of plane (B, C, H, W) to multiples of table * factor (B,)."""
    B, C, H, W = plane.shape
    dct, step = on(plane.device, DCT), on(plane.device, table).flatten() * factor.view(-1, 1, 1)
    blocks = plane.reshape(B, C, H // 8, 8, W // 8, 8).transpose(3, 4).reshape(B, -1, 64)
    blocks = ((blocks @ dct.T) / step).round() * step @ dct
    return blocks.view(B, C, H // 8, W // 8, 8, 8).transpose(3, 4).reshape(B, C, H, W)


def jpeg(image, quality, sizes=None):
    """JPEG with 4:2:0 chroma, quality (B,) of any floats; clamps its input, rounds only coefficients."""
    (H, W), beyond = image.shape[-2:], outside(image, sizes)
    quality = on(image.device, quality)
    factor = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    image = image.clamp(0, 1) if beyond is None else image.clamp(0, 1).masked_fill(beyond, 0)
    image = F.pad(image * 255, (0, -W % 16, 0, -H % 16))  # zeros: edge blocks ring, as in the original
    planes = torch.einsum("ij,bjhw->bihw", on(image.device, TO_YCBCR), image)
    y = quantise(planes[:, :1] - 128, LUMA_TABLE, factor) + 128
    chroma = quantise(F.avg_pool2d(planes[:, 1:], 2), CHROMA_TABLE, factor)  # its offsets, +128 - 128, cancel
    chroma = chroma.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    image = torch.einsum("ij,bjhw->bihw", on(image.device, TO_RGB), torch.cat([y, chroma], dim=1))
    return (image[..., :H, :W] / 255).clamp(0, 1)


def round_levels(image):
    """Round to 8 bits (half to even) and clamp: the last step of the degradation."""
    return (image * 255).round_().clamp_(0, 255).div_(255)


# ---------------------------------------------------------------- the degradation, drawn and applied
def uniform_numbers(generator, count):
    """A function uniform(low, high) that yields up to `count` numbers of the generator."""
    numbers = iter(torch.rand(count, generator=generator, device=generator.device).tolist())
    return lambda low=0.0, high=1.0: low + (high - low) * next(numbers)


def draw_kernel(uniform, pick, kernels, sigma):
    """Arguments of blur_kernel for one kernel."""
    kind, size = pick(*zip(*kernels, strict=True)), pick(KERNEL_SIZES)
    if kind == "sinc":
        return dict(kind=kind, size=size, cutoff=uniform(math.pi / (3 if size < 13 else 5), math.pi))
    draw = dict(kind=kind, size=size, sigma_x=uniform(*sigma))
    if kind.endswith("aniso"):
        draw |= dict(sigma_y=uniform(*sigma), theta=uniform(-math.pi, math.pi))
    if shape := BETA.get(kind.split("_")[0]):
        draw["beta"] = uniform(*pick(shape))
    return draw


def draw_degradation(height, width, generator, settings, scale=4, shared=None):
    """All that is random for ONE sample, except the noise: plain values, the arguments of degrade_with.
    shared: generator, left as it is, for all but strength and colour of noise and quality of JPEG."""
    own, small = uniform_numbers(generator, 64), (height // scale, width // scale)
    uniform = uniform_numbers(shared.clone_state(), 64) if shared else own

    def pick(values, shares=None):
        shares = shares or [1] * len(values)
        u, edges = uniform(0, sum(shares)), itertools.accumulate(shares)
        return next((value for value, edge in zip(values, edges, strict=True) if u < edge), values[-1])

    draws = {}
    for n, stage in enumerate(settings["stages"], start=1):
        if uniform() < stage["blur"]:
            draws[f"kernel{n}"] = draw_kernel(uniform, pick, stage["kernels"], stage["sigma"])
        mode, grid = pick(stage["modes"]), dict(size=small)
        if stage["resize"]:
            factor = uniform(*pick(*zip(*stage["resize"], strict=True)))
            size = tuple(max(1, int(side / scale * factor)) for side in (height, width))
            # The first resize is called with the factor, the second with a size: their grids differ.
            grid = dict(scale_factor=factor) if n == 1 else dict(size=size, factor=factor)
        draws[f"resize{n}"] = dict(mode=mode) | grid
        kind = "gaussian" if uniform() < stage["gaussian"] else "poisson"
        strength = own(*stage["gaussian_sigma" if kind == "gaussian" else "poisson_scale"])
        draws[f"noise{n}"] = dict(kind=kind, strength=strength, gray=own() < stage["gray"])
        early = n == 2 and uniform() < 0.5  # last JPEG before the resize to LR, or after the final filter
        draws["jpeg1" if n == 1 else "jpeg2_early" if early else "jpeg2_late"] = own(*stage["jpeg"])
    if len(settings["stages"]) > 1:
        draws["resize_lr"] = dict(size=small, mode=pick(stage["modes"]))
    if uniform() < settings["sinc"]:
        draws["sinc"] = dict(kind="sinc", size=pick(KERNEL_SIZES), cutoff=uniform(math.pi / 3, math.pi))
    draws["resize_back"] = dict(size=(height, width), mode=pick(settings["back"]))
    return draws


def draw_batch(count, height, width, generator, kind="full", scale=4, per_batch=False):
    """`count` draws. kind: a row of DEGRADATIONS; joined by +, each sample takes one of them.

    per_batch: like the official loader; kernels, sizes, kind of noise, ... are drawn once for all samples."""
    if unknown := [name for name in kind.split("+") if name not in DEGRADATIONS]:
        raise ValueError(f"unknown degradation {unknown[0]!r}; {', '.join(DEGRADATIONS)} exist, + joins them")
    rows = [DEGRADATIONS[name] for name in kind.split("+")]
    which = torch.randint(len(rows), (count,), generator=generator).tolist()
    shared, which = (generator.clone_state(), which[:1] * count) if per_batch else (None, which)
    return [draw_degradation(height, width, generator, rows[k], scale, shared) for k in which]


def operate(image, sizes, values, op):
    """op(images, values, sizes) on the samples whose value is not None; the others stay as they are."""
    members = [b for b, value in enumerate(values) if value is not None]
    if len(members) in (0, len(image)):
        return op(image, values, sizes) if members else image
    rows = on(image.device, members)
    return image.index_copy(0, rows, op(image[rows], *([v[b] for b in members] for v in (values, sizes))))


def degrade_with(hr, draws, randn, poisson, enlarged=True):
    """Apply plain draws, a dict per sample, to hr (B, 3, H, W) in [0, 1] -> lr as from degrade.
    In order: kernel1, resize1, noise1, jpeg1, kernel2, resize2, noise2, jpeg2_early, resize_lr, sinc,
    jpeg2_late, resize_back; absent keys are skipped. A kernel may also be a tensor (k, k). The noise fields
    come from randn(shape) and poisson(rate)."""
    def values(key):
        return [draw.get(key) for draw in draws]

    def blurred(x, kernels, sizes):
        kernels = [kernel if torch.is_tensor(kernel) else blur_kernel(**kernel) for kernel in kernels]
        k = max(map(len, kernels))
        return blur(x, torch.stack([F.pad(one, [(k - len(one)) // 2] * 4) for one in kernels]), sizes)

    def noisy(x, noises, sizes):
        gray, strength = noises[0]["gray"], on(x.device, [noise["strength"] for noise in noises])
        if noises[0]["kind"] == "poisson":
            return poisson_noise(x, strength, poisson, gray, sizes)
        return gaussian_noise(x, strength, randn((len(x), 1 if gray else 3, *x.shape[-2:])))

    x, sizes = hr.float(), [tuple(hr.shape[-2:])] * len(hr)
    for n in "12":
        x = operate(x, sizes, values(f"kernel{n}"), blurred)
        x, sizes = resize(x, values(f"resize{n}"), sizes)
        for like in itertools.product(("gaussian", "poisson"), (False, True)):  # together what is alike
            alike = [v if v and (v["kind"], v["gray"]) == like else None for v in values(f"noise{n}")]
            x = operate(x, sizes, alike, noisy)
        x = operate(x, sizes, values("jpeg1" if n == "1" else "jpeg2_early"), jpeg)
    x, sizes = resize(x, values("resize_lr"), sizes)
    x = operate(x, sizes, values("sinc"), blurred)
    x = operate(x, sizes, values("jpeg2_late"), jpeg)
    if enlarged:
        x, sizes = resize(x, values("resize_back"), sizes)
    return round_levels(x)


@torch.no_grad()
def degrade(hr, generator, kind="full", enlarged=True, scale=4, per_batch=False):
    """LR for hr (B, 3, H, W) in [0, 1]: every sample with its own draws, rounded to 8 bits, in [0, 1].
    enlarged: LR enlarged back to (H, W), what the networks see; otherwise LR, (B, 3, H // scale, W // scale).
    kind, per_batch: see draw_batch. generator: of the CPU; what it draws is the same on every device, only
    the noise is a GPU's own, seeded by it. On a GPU, TF32 products may move the result by a level."""
    B, _, H, W = hr.shape
    if min(H, W) < 8:
        raise ValueError(f"an HR picture of {H} x {W} px is too small to degrade, both sides need 8 px")
    draws, noise = draw_batch(B, H, W, generator, kind, scale, per_batch), generator
    if hr.is_cuda:
        noise = torch.Generator(hr.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    fields = (lambda shape: torch.randn(shape, generator=noise, device=noise.device).to(hr.device),
              lambda rate: torch.poisson(rate.to(noise.device), generator=noise).to(hr.device))
    # Sample by sample on a CPU, where no work is to be wasted; on a GPU few large calls, like sizes together.
    chunk, threads = 64 if hr.is_cuda else 1, torch.get_num_threads()
    order = sorted(range(B), key=lambda b: draws[b]["resize1"].get("scale_factor", 0) if hr.is_cuda else b)
    lr = torch.empty(B, 3, *((H, W) if enlarged else (H // scale, W // scale)), device=hr.device)
    torch.set_num_threads(threads if hr.is_cuda else 1)  # several are slower: a sample is too little to share
    try:
        with torch.autocast(hr.device.type, enabled=False):
            for members in (order[i : i + chunk] for i in range(0, B, chunk)):
                rows = on(hr.device, members)
                lr[rows] = degrade_with(hr[rows], [draws[b] for b in members], *fields, enlarged)
    finally:
        torch.set_num_threads(threads)
    return lr


# ---------------------------------------------------------------- sources of training pictures
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif")
MAX_BYTES = 2**28  # larger members of a tar are not read
WINDOW, ENDLESS = 16, 2**40  # tars whose pictures are mixed at a time; number of procedural pictures


def shuffled(i, n, *key):
    """Element i of a permutation of range(n) that depends on `key`, without a list of n numbers: a Feistel
    network permutes the numbers below a power of four; one that falls beyond n goes round again."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = divmod(i, 2**half)
        for turn in range(4):
            digest = hashlib.blake2b(repr((turn, right, *key)).encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") % 2**half)
        if (i := left * 2**half + right) < n:
            return i


def write_shard(path, members):
    """Write (name, content) pairs as a tar in the WebDataset layout: same members, same bytes."""
    def write(hidden):
        with tarfile.open(hidden, "w") as tar:
            for name, content in members:
                (info := tarfile.TarInfo(name)).size = len(content)
                tar.addfile(info, io.BytesIO(content))

    write_whole(path, write)


@functools.lru_cache(maxsize=4 * WINDOW)
def shard_members(path):
    """(name, offset, size) of the pictures in a tar: plain files, looked at in place, never extracted."""
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            found.extend((m.name, m.offset_data, m.size) for m in tar  # keeps what comes before an error
                         if m.isreg() and not m.issparse() and Path(m.name).suffix.lower() in SUFFIXES)
    except (tarfile.TarError, OSError) as reason:
        print(f"{path} is damaged after {len(found)} pictures: {reason}", flush=True)
    return found


class Source:
    """Pictures 0 ... count - 1, those of all `parts` in turn: (path, number of pictures) of a file, of a tar,
    or of "procedural" ones. partners: LR file of each HR file, if they are pairs."""

    def __init__(self, spec, parts, partners):
        self.spec, self.names, self.partners = str(spec), [name for name, _ in parts], partners
        self.ends = list(itertools.accumulate(n for _, n in parts))
        self.count, self.chunk = self.ends[-1], max((n for p, n in parts if p.endswith(".tar")), default=1)
        self.bad, self.small, self.tried = set(), set(), 0  # numbers that are of no use; attempts
        self.limit = 0.01  # share of unreadable pictures above which training stops; one is always allowed

    def path(self, k):
        """File that holds picture k, and its number there."""
        part = bisect.bisect_right(self.ends, k)
        return self.names[part], k - (self.ends[part - 1] if part else 0)

    def image(self, k, generator=None, side=256):
        """Picture k -> uint8 (3, H, W), or ValueError; a made one follows from generator and side alone."""
        path, k = self.path(k)
        if path == "procedural":
            return dead_leaves(generator, side)
        if not path.endswith(".tar"):
            return read_levels(path)
        if not (members := shard_members(path)):
            raise ValueError(f"{path} holds no pictures")
        name, offset, size = members[k % len(members)]  # a damaged tar, which was named, shows some twice
        if size > MAX_BYTES:
            raise ValueError(f"{path}/{name} has {size} bytes, at most {MAX_BYTES} are read")
        with open(path, "rb") as file:
            file.seek(offset)
            return read_levels(f"{path}/{name}", file.read(size))

    def partner(self, k, size, side, box):
        """`box` of HR picture k, of `size` (H, W), from its LR picture -> uint8 (side, side, 3); or None."""
        if (path := self.partners.get(self.path(k)[0])) is None:
            return None
        lr = Image.fromarray(read_levels(path).permute(1, 2, 0).numpy())
        across, down = lr.width / size[1], lr.height / size[0]
        if abs(lr.height - across * size[0]) > 1:
            raise ValueError(f"{path} is {lr.width}x{lr.height}, its HR {size[1]}x{size[0]}")
        box = [n * f for n, f in zip(box, (across, down) * 2, strict=True)]
        return torch.from_numpy(np.array(lr.resize((side, side), Image.Resampling.BICUBIC, box)))

    def choose(self, i, seed):
        """Candidates for sample i of a run: its picture, then the next. Every epoch has an order of its own:
        chunks as large as a tar change places, and pictures within WINDOW of them, so few tars are in use."""
        n, window = self.count, WINDOW * self.chunk
        whole = n // self.chunk * self.chunk
        for epoch, k in (divmod(j, n) for j in range(i, i + n)):
            if k < whole:  # the rest of less than a chunk comes last, as it is
                first = k // window * window
                k = first + shuffled(k - first, min(window, whole - first), seed, epoch, first)
                k = shuffled(k // self.chunk, n // self.chunk, seed, epoch) * self.chunk + k % self.chunk
            if k not in self.bad and k not in self.small:
                yield k


def pictures_in(folder):
    """Paths of all picture files below a folder, sorted; what is hidden is left out."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                  and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def find_pictures(path):
    """Folder of pictures, of HR/ and LR/, or of tars; tar; text file of paths -> parts, partners of a Source.
    A folder of tars is not listed if it has an index.json {file name: number of pictures}, see tools/pack.py;
    else all headers are read, which takes a while for millions of pictures. ValueError."""
    if (index := path / "index.json").is_file():
        try:
            counts = json.loads(index.read_bytes()).items()
            return [(str(path / tar), range(n)[-1] + 1) for tar, n in counts], {}  # no n below 1
        except (ValueError, AttributeError, TypeError, IndexError):
            raise ValueError(f"{index} is not {{tar: number of its pictures}}") from None
    partners, tars = {}, sorted(path.glob("[!.]*.tar")) or [path]
    if tars[0].is_file() and tars[0].suffix == ".tar":
        bar = tqdm(map(str, tars), desc="headers", total=len(tars), disable=None, leave=False)
        return [(tar, n) for tar in bar if (n := len(shard_members(tar)))], {}
    if (path / "HR").is_dir() and (path / "LR").is_dir():
        high, low = ({p.relative_to(path / side).with_suffix(""): str(p) for p in pictures_in(path / side)}
                     for side in ("HR", "LR"))
        if odd := sorted(high.keys() ^ low.keys()):
            raise ValueError(f"{path}: {odd[0]} is not in both HR and LR")
        names, partners = high.values(), {high[stem]: low[stem] for stem in high}
    elif path.is_dir():
        names = pictures_in(path)
    elif path.is_file():
        lines = path.read_bytes()
        if b"\0" in lines:
            raise ValueError(f"{path} is not a text file of paths")
        lines = os.fsdecode(lines.removeprefix(b"\xef\xbb\xbf")).splitlines()  # a mark of Windows
        names = [path.parent / line.strip() for line in lines if line.strip()]
    else:
        raise ValueError(f"{path} does not exist; give a folder, a list file, a tar, or procedural")
    return [(str(name), 1) for name in names], partners


def open_source(spec):
    """What find_pictures takes, or "procedural"; several with commas between -> Source. ValueError.
    "photos:3,procedural:5000" shows each of the photos three times an epoch, beside 5000 made pictures."""
    parts, partners = [], {}
    for word in [str(spec)] if Path(spec).exists() else str(spec).split(","):
        name, times = re.fullmatch(r"(.*?)(?::([1-9]\d*))?", word.strip()).groups()
        found, pairs = ([(name, 1)], {}) if name == "procedural" else find_pictures(Path(name))
        if not found:
            raise ValueError(f"{name} holds no pictures; {', '.join(SUFFIXES)} are read, also in tar files")
        endless = 5000 if "," in str(spec) else ENDLESS
        parts += [(name, int(times or endless))] if name == "procedural" else found * int(times or 1)
        partners |= pairs
    return Source(spec, parts, partners)


def describe(source):
    """A line to print at opening: number of pictures, smallest side (of 200 of them), first three names."""
    sides = []
    for name in source.names[:: max(1, len(source.names) // 200)]:
        with suppress(*BROKEN), Image.open(name) as picture:  # it is reported when its turn comes
            sides.append(min(picture.size))
    number, smallest = min(source.count, ENDLESS), f"smallest side {min(sides)} px, " if sides else ""
    return (f"{source.spec}: {'endless' if number == ENDLESS else number} pictures, {smallest}"
            f"{', '.join(source.names[:3])}, ...")


class Crops(torch.utils.data.Dataset):
    """Samples of a run by number -> hr, lr, uint8 (3, R, R) each, and whether there is an lr; else it is hr.
    Functions of these, so a run resumes with the next number and any split over ranks and workers gives the
    same. The next picture stands in for one that cannot be read (reported) or is smaller than R (counted)."""

    def __init__(self, source, resolution, seed):
        self.source, self.resolution, self.seed = source, resolution, seed

    def __getitem__(self, number):
        source, R = self.source, self.resolution
        for k in source.choose(number, self.seed):
            try:
                generator, source.tried = keyed_generator("cpu", "crop", self.seed, number), source.tried + 1
                hr = source.image(k, generator, R)
                if min(size := hr.shape[1:]) >= R:
                    top, left = (int(torch.randint(n - R + 1, (), generator=generator)) for n in size)
                    lr = source.partner(k, size, R, (left, top, left + R, top + R))
                    hr = hr[:, top : top + R, left : left + R].contiguous()
                    return hr, hr if lr is None else lr.permute(2, 0, 1), lr is not None
                source.small.add(k)
            except ValueError as reason:
                source.bad.add(k)
                print(f"unreadable: {reason}", flush=True)
                bad, seen = len(source.bad), min(source.count, max(source.tried, 2000))
                if bad > max(1, source.limit * seen):
                    raise ValueError(f"{source.spec}: {bad} of {seen} cannot be read, remove them") from None
        raise ValueError(f"{source.spec}: {len(source.small)} pictures are smaller than {R} px, "
                         f"{len(source.bad)} cannot be read, none is left; lower --resolution")


# ---------------------------------------------------------------- procedural pictures
font = functools.lru_cache(maxsize=128)(ImageFont.load_default)  # Pillow's own, by size


def dead_leaves(generator, side=256):
    """A picture that needs no download: shapes of every size that hide one another -> uint8 (3, side, side).

    "Dead leaves" share the 1/f spectrum and the occlusion edges of photographs. Blobs, polygons, strokes and
    letters, flat or with a texture of equal power per octave; drawn at twice the side: smooth edges."""
    uniform, big = uniform_numbers(generator, 8192 + side * side // 8), 2 * side
    tones = ((uniform(10, 245), 90 * uniform() ** 3) for _ in range(6))  # level, strength: mostly pale
    inks = [[level + uniform(-strength, strength) for _ in range(3)] for level, strength in tones]

    def fill():  # red, green, blue of one of the inks, and the amount of texture
        ink = [*inks[int(uniform(0, 6))], uniform(-150, 230)]
        return tuple(int(min(max(c + uniform(-25, 25), 0), 255)) for c in ink)

    picture = Image.new("CMYK", (big, big), fill())  # a mode with four bands
    pen, radii = ImageDraw.Draw(picture), [1 / uniform(1 / big, 1 / 4) for _ in range(40 + big * big // 1500)]
    for _, r in sorted(((r * uniform(0.3, 3), r) for r in radii), reverse=True):  # large ones mostly behind
        x, y, kind, how = uniform(-r, big + r), uniform(-r, big + r), uniform(), uniform()
        corners = 8 + int(r**0.5) if kind < 0.4 else 4 if kind < 0.7 else int(uniform(3, 9))
        flat, rough, turn, points = uniform(0.25, 1), 0.6 * (kind >= 0.7), cmath.rect(1, uniform(0, 6.28)), []
        for n in range(corners):  # of an ellipse, a rectangle, or a polygon without symmetry, turned
            spoke = cmath.rect(1 - uniform(0, rough), 2 * math.pi * (n + uniform(0, rough)) / corners)
            point = complex(x, y) + r * turn * complex(spoke.real, flat * spoke.imag)
            points.append((point.real, point.imag))
        if how < 0.06:
            letters = "".join(chr(int(uniform(65, 91)) + 32 * (uniform() < 0.6)) for _ in range(corners))
            pen.text((x - r, y - r / 2), letters, fill(), font(int(min(max(r, 12), 90))))
        elif how < 0.2:
            pen.line(points[: corners // 2 + 1], fill(), int(uniform(1, 2 + r / 8)), joint="curve")
        else:
            pen.polygon(points, fill())
    image = torch.from_numpy(np.array(picture.reduce(2))).permute(2, 0, 1).float()
    octaves = (torch.randn(1, 1, -(-side // 2**n), -(-side // 2**n), generator=generator) for n in range(6))
    texture = sum(F.interpolate(octave, (side, side), mode="bicubic") for octave in octaves)[0]
    return (image[:3] + 10 * image[3:] / 255 * texture + 0.5).clamp(0, 255).byte()


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("tools") / "sheet.py"), run_name="__main__")
