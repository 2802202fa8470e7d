"""Pictures in and out, the degradation that makes LR from HR, and where training pictures come from.

    python data.py show photos/                         # contact_sheet.png: HR | LR | what was drawn
    python data.py show procedural --degradation mild   # pictures that need no download, milder

Pixels are float32 in [0, 1] except where uint8 is written. The degradation is Real-ESRGAN's two stages of
blur, resize, noise and JPEG as VOSR uses them, but each sample has its own draws, not each batch.
"""
import functools
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import struct
import threading
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

from config import cli, die

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


@dataclass
class Config:
    out: str = "contact_sheet.png"  # the picture that `show` writes
    rows: int = 8  # samples on it
    resolution: int = 128  # side of the HR crop in pixels
    degradation: str = "full+mild"  # full, mild, or full+mild: half of each, as tiny is trained
    seed: int = 0  # same seed, same sheet
    inputs: tuple = ()  # show SOURCE


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


def open_picture(path, max_pixels=MAX_PIXELS):
    """Image file -> PIL image: first frame, decoded, upright. ValueError with a line that names the file."""
    with reading:  # Pillow's own limit is a global, and too low: it warns at 89 million pixels
        known, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as picture:
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
            wrong = f"is not an image that can be read; PNG, JPEG, WebP, ... work ({reason})"
        finally:
            Image.MAX_IMAGE_PIXELS = known
    raise ValueError(f"{path} {wrong}")


def split_picture(image):
    """PIL image of any mode -> Picture, upright, 8 bits per channel. ValueError for pixels of unknown range.

    rgb: RGB, may be `image` itself; alpha: L, or None; grey: whether it had no colours; icc: its profile if
    that describes RGB, or grey pixels; notes: for the user, what else was done to it.
    """
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
    if alpha is None:
        return rgb
    paper = Image.new("RGB", rgb.size, "white")
    paper.paste(rgb, mask=alpha)
    return paper


def decode(path, keep_16_bits=True):
    """Image file -> (H, W, 3), upright, alpha on white: uint8, or uint16 for 16-bit grey. ValueError."""
    picture = open_picture(path)
    if keep_16_bits and is_deep(picture):
        return np.repeat(np.asarray(picture).astype(np.uint16)[..., None], 3, axis=2)
    return np.array(on_white(*split_picture(picture)[:2]))


def read_image(path):
    """Image file -> (3, H, W) float32 in [0, 1]: upright, alpha on white, grey repeated, 16 bits kept."""
    pixels = decode(path)
    image = torch.from_numpy(pixels.astype(np.float32) / np.iinfo(pixels.dtype).max)
    return image.permute(2, 0, 1).contiguous()


def to_pillow(image):
    """(3, H, W) float in [0, 1] -> 8-bit PIL image; clamped, rounded half up."""
    levels = (image.detach().float().cpu() * 255 + 0.5).floor().clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def write_whole(path, write):
    """write(hidden) makes a file or folder beside `path`, flushed and renamed: nobody sees half of it."""
    path = Path(path)
    hidden = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
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
    """ValueError if the format of path cannot hold a picture of `size`."""
    suffix = Path(path).suffix.lower()
    if max(size) > (longest := LONGEST_SIDE.get(suffix, math.inf)):
        raise ValueError(f"{path}: {max(size)} px a side, {suffix} has {longest} at most; PNG has more")


def save_picture(path, rgb, alpha=None, grey=False, icc=None):
    """Write RGB, as L if grey, with alpha (L; JPEG: on white), in the format of the extension. ValueError."""
    check_format(path, rgb.size)
    suffix = Path(path).suffix.lower()
    if suffix in (".jpg", ".jpeg"):
        rgb, alpha = on_white(rgb, alpha), None
    picture = rgb.convert("L") if grey else rgb
    if alpha is not None:
        picture = picture.copy()  # putalpha works in place
        picture.putalpha(alpha)
    icc = None if grey and suffix == ".webp" else icc  # WebP stores grey as RGB
    write_whole(path, lambda hidden: picture.save(hidden, icc_profile=icc, quality=95, subsampling="4:4:4"))


def write_image(path, image):
    """Write (3, H, W) float in [0, 1]; the extension decides the format."""
    save_picture(path, to_pillow(image))


# ---------------------------------------------------------------- operations of the degradation
# Samples of a batch may differ in size: b fills the upper left sizes[b] = (h, w) of the canvas (B, 3, H, W),
# what lies outside is never read. sizes = None: all fill it.

def outside(image, sizes):
    """Mask (B, 1, H, W) of the pixels that belong to no sample; None if there are none."""
    if sizes is None or all(size == tuple(image.shape[-2:]) for size in sizes):
        return None
    extent = torch.tensor(sizes, device=image.device)  # (B, 2)
    row, column = (torch.arange(n, device=image.device) for n in image.shape[-2:])
    return ((row >= extent[:, :1])[:, :, None] | (column >= extent[:, 1:])[:, None, :])[:, None]


def blur_kernel(kind, size, sigma_x=1.0, sigma_y=1.0, theta=0.0, beta=1.0, cutoff=1.0):
    """One kernel of Real-ESRGAN's mixture, computed in float64 -> (size, size) float32, sum 1.

    Kinds: iso exp(-d^2 / 2), generalized_iso exp(-d^(2 beta) / 2), plateau_iso 1 / (1 + d^(2 beta)), all with
    sigma_x alone; with aniso for iso, along axes turned by theta. sinc: the circular low-pass
    w J1(w r) / (2 pi r), w = cutoff in radians per pixel.
    """
    x = np.arange(size) - (size - 1) / 2
    y = x[:, None]
    if kind == "sinc":
        centre, r = (size // 2, size // 2), np.hypot(x, y)
        r[centre] = 1  # anything but 0; the limit is put in below
        kernel = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * r)).numpy() / (2 * math.pi * r)
        kernel[centre] = cutoff**2 / (4 * math.pi)
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
    odd = [3**b * 5**c for b in range(8) for c in range(6)]
    return min(m * 2 ** max(0, math.ceil(math.log2(n / m))) for m in odd)


def reflect(image, pad, sizes):
    """Reflect each sample at its edges (edge not repeated) -> (B, 3, H + 2 pad, W + 2 pad)."""
    for dim in (2, 3):  # where pad exceeds a side the reflection repeats: every size from 1 px works
        n = image.shape[dim]
        period = torch.tensor([max(2 * size[dim - 2] - 2, 1) for size in sizes], device=image.device)[:, None]
        index = torch.arange(-pad, n + pad, device=image.device) % period  # (B, n + 2 pad)
        index = torch.minimum(index, period - index)
        index = index[:, None, :, None] if dim == 2 else index[:, None, None]
        image = image.gather(dim, index.expand(*image.shape[:dim], -1, *image.shape[dim + 1 :]))
    return image


def blur(image, kernels, sizes=None):
    """Cross-correlation of image (B, 3, H, W) with kernels (B, k, k), one per sample; reflecting edges."""
    (B, C, H, W), k, kernels = image.shape, kernels.shape[-1], kernels.to(image.device)
    padded = reflect(image, k // 2, sizes or [(H, W)])
    if k <= 7 and not image.is_cuda:  # below about 9 x 9 the direct sum is faster than the FFT
        weight, planes = kernels.repeat_interleave(C, dim=0)[:, None], padded.flatten(0, 1)[None]
        return F.conv2d(planes, weight, groups=B * C).view(image.shape)
    shape = [fast_length(n) for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=shape) * torch.fft.rfft2(kernels, s=shape).conj()[:, None]
    return torch.fft.irfft2(spectrum, s=shape)[..., :H, :W].contiguous()


def resize_matrix(mode, n_in, n_out, step, shape, device):
    """Matrices (B, *shape) that resize one axis from n_in to n_out pixels, (B,) each, not antialiased."""
    i = torch.arange(shape[0])
    if mode == "area":  # mean of all pixels that the output pixel touches
        first = (i * n_in[:, None] // n_out[:, None]).to(device)[..., None]
        end = (((i + 1) * n_in[:, None] - 1) // n_out[:, None] + 1).to(device)[..., None]
        j = torch.arange(shape[1], device=device)
        return ((j >= first) & (j < end)) / (end - first).float()
    if mode == "bilinear":  # PyTorch copies an axis that keeps its length, whatever the factor
        step = torch.where(n_in == n_out, 1.0, step)
    position = ((i + 0.5) * step[:, None].double() - 0.5).float()  # (B, rows), rounded once as by PyTorch
    if mode == "bilinear":
        position = position.clamp(min=0)
        t = position - position.floor()
        taps, weights = (0, 1), (1 - t, t)
    else:  # bicubic, a = -0.75
        a, t = -0.75, position - position.floor()
        near = [((a + 2) * s - (a + 3)) * s * s + 1 for s in (t, 1 - t)]
        far = [((a * s - 5 * a) * s + 8 * a) * s - 4 * a for s in (t + 1, 2 - t)]
        taps, weights = (-1, 0, 1, 2), (far[0], *near, far[1])
    index = position.floor().long()[..., None] + torch.tensor(taps)
    index = index.clamp(min=0).minimum(n_in[:, None, None] - 1)
    matrix = torch.zeros(len(n_in), *shape, device=device)
    return matrix.scatter_add_(2, index.to(device), torch.stack(weights, dim=-1).to(device))


def resize(image, draws, sizes=None):
    """Resize each sample as PyTorch's interpolate does (align_corners False) -> image and its new sizes.

    A draw is dict(mode, size=(h, w)), or dict(mode, scale_factor), whose grid follows the factor itself and
    not the rounded size, or None, which keeps the sample.
    """
    sizes = sizes or [tuple(image.shape[-2:])] * len(image)
    targets, steps, modes = [], [], ["area" if draw is None else draw["mode"] for draw in draws]
    for draw, size in zip(draws, sizes, strict=True):
        if draw and "scale_factor" in draw:
            targets.append(tuple(math.floor(n * draw["scale_factor"]) for n in size))
            steps.append([1 / draw["scale_factor"]] * 2)
        else:
            targets.append(tuple(draw["size"]) if draw else size)
            steps.append([n / m for n, m in zip(size, targets[-1], strict=True)])
    if targets == sizes and all(step == [1, 1] for step in steps):
        return image, sizes
    if len(image) == 1 and modes[0] != "area":
        call = {name: draws[0][name] for name in ("size", "scale_factor") if name in draws[0]}
        return F.interpolate(image, **call, mode=modes[0]), targets  # faster than a matrix, except for areas
    n_in, n_out, steps = torch.tensor(sizes), torch.tensor(targets), torch.tensor(steps)
    for axis, length in enumerate(image.shape[-2:]):
        matrix = torch.empty(len(image), int(n_out[:, axis].max()), length, device=image.device)
        for mode in sorted(set(modes)):
            some = [b for b, m in enumerate(modes) if m == mode]
            matrix[some] = resize_matrix(mode, n_in[some, axis], n_out[some, axis], steps[some, axis],
                                         matrix.shape[1:], image.device)
        image = matrix[:, None] @ image if axis == 0 else image @ matrix[:, None].mT
    return image, targets


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
    dct, step = DCT.to(plane.device), table.to(plane.device).flatten() * factor.view(-1, 1, 1)
    blocks = plane.reshape(B, C, H // 8, 8, W // 8, 8).transpose(3, 4).reshape(B, -1, 64)
    blocks = ((blocks @ dct.T) / step).round() * step @ dct
    return blocks.view(B, C, H // 8, W // 8, 8, 8).transpose(3, 4).reshape(B, C, H, W)


def jpeg(image, quality, sizes=None):
    """JPEG with 4:2:0 chroma, quality (B,) of any floats; clamps its input, rounds only coefficients."""
    (H, W), beyond = image.shape[-2:], outside(image, sizes)
    quality = torch.as_tensor(quality, device=image.device)
    factor = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality) / 100
    image = image.clamp(0, 1) if beyond is None else image.clamp(0, 1).masked_fill(beyond, 0)
    image = F.pad(image * 255, (0, -W % 16, 0, -H % 16))  # zeros: edge blocks ring, as in the original
    planes = torch.einsum("ij,bjhw->bihw", TO_YCBCR.to(image.device), image)
    y = quantise(planes[:, :1] - 128, LUMA_TABLE, factor) + 128
    chroma = quantise(F.avg_pool2d(planes[:, 1:], 2), CHROMA_TABLE, factor)  # its offsets, +128 - 128, cancel
    chroma = chroma.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    image = torch.einsum("ij,bjhw->bihw", TO_RGB.to(image.device), torch.cat([y, chroma], dim=1))
    return (image[..., :H, :W] / 255).clamp(0, 1)


def round_levels(image):
    """Round to 8 bits (half to even) and clamp: the last step of the degradation."""
    return (image * 255).round().clamp(0, 255) / 255


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


def draw_degradation(height, width, generator, settings, scale=4):
    """All that is random for ONE sample, except the noise: plain values, the arguments of degrade_with."""
    uniform, small = uniform_numbers(generator, 64), (height // scale, width // scale)

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
        strength = uniform(*stage["gaussian_sigma" if kind == "gaussian" else "poisson_scale"])
        draws[f"noise{n}"] = dict(kind=kind, strength=strength, gray=uniform() < stage["gray"])
        early = n == 2 and uniform() < 0.5  # last JPEG before the resize to LR, or after the final filter
        draws["jpeg1" if n == 1 else "jpeg2_early" if early else "jpeg2_late"] = uniform(*stage["jpeg"])
    if len(settings["stages"]) > 1:
        draws["resize_lr"] = dict(size=small, mode=pick(stage["modes"]))
    if uniform() < settings["sinc"]:
        draws["sinc"] = dict(kind="sinc", size=pick(KERNEL_SIZES), cutoff=uniform(math.pi / 3, math.pi))
    draws["resize_back"] = dict(size=(height, width), mode=pick(settings["back"]))
    return draws


def draw_batch(count, height, width, generator, kind="full", scale=4):
    """`count` independent draws. kind: a row of DEGRADATIONS; joined by +, each sample takes one of them."""
    if unknown := [name for name in kind.split("+") if name not in DEGRADATIONS]:
        raise ValueError(f"unknown degradation {unknown[0]!r}; {', '.join(DEGRADATIONS)} exist, + joins them")
    rows = [DEGRADATIONS[name] for name in kind.split("+")]
    which = torch.randint(len(rows), (count,), generator=generator, device=generator.device).tolist()
    return [draw_degradation(height, width, generator, rows[k], scale) for k in which]


def operate(image, sizes, values, op):
    """op(images, values, sizes) on the samples whose value is not None; the others stay as they are."""
    members = [b for b, value in enumerate(values) if value is not None]
    if not members:
        return image
    if len(members) == len(image):
        return op(image, values, sizes)
    image = image.clone()
    image[members] = op(image[members], [values[b] for b in members], [sizes[b] for b in members])
    return image


def degrade_with(hr, draws, randn, poisson, enlarged=True):
    """Apply plain draws, a dict per sample, to hr (B, 3, H, W) in [0, 1] -> lr as from degrade.

    In order: kernel1, resize1, noise1, jpeg1, kernel2, resize2, noise2, jpeg2_early, resize_lr, sinc,
    jpeg2_late, resize_back; absent keys are skipped. A kernel may also be a tensor (k, k). The noise fields
    come from randn(shape) and poisson(rate).
    """
    def values(key):
        return [draw.get(key) for draw in draws]

    def blurred(x, kernels, sizes):
        kernels = [kernel if torch.is_tensor(kernel) else blur_kernel(**kernel) for kernel in kernels]
        k = max(map(len, kernels))
        kernels = [F.pad(kernel, [(k - len(kernel)) // 2] * 4) for kernel in kernels]
        return blur(x, torch.stack(kernels), sizes)

    def noisy(x, noises, sizes):
        gray, strength = noises[0]["gray"], torch.tensor([n["strength"] for n in noises], device=x.device)
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
def degrade(hr, generator, kind="full", enlarged=True, scale=4):
    """LR for hr (B, 3, H, W) in [0, 1]: every sample with its own draws, rounded to 8 bits, in [0, 1].

    enlarged: LR enlarged back to (H, W), what the networks see; otherwise LR, (B, 3, H // scale, W // scale).
    kind: see draw_batch. Random numbers come from the generator's device, so a CPU generator gives the same
    draws everywhere. On a GPU, TF32 products may move the result by a level.
    """
    B, _, H, W = hr.shape
    if min(H, W) < 8:
        raise ValueError(f"an HR picture of {H} x {W} px is too small to degrade, both sides need 8 px")
    draws = draw_batch(B, H, W, generator, kind, scale)

    def randn(shape):
        return torch.randn(shape, generator=generator, device=generator.device).to(hr.device)

    def poisson(rate):
        return torch.poisson(rate.to(generator.device), generator=generator).to(hr.device)

    # Sample by sample on a CPU, where no work is to be wasted; on a GPU few large calls, like sizes together.
    chunk = 64 if hr.is_cuda else 1
    order = sorted(range(B), key=lambda b: draws[b]["resize1"].get("scale_factor", 0) if hr.is_cuda else b)
    lr = torch.empty(B, 3, *((H, W) if enlarged else (H // scale, W // scale)), device=hr.device)
    threads = torch.get_num_threads()  # one sample is too little work to share: several threads are slower
    torch.set_num_threads(threads if hr.is_cuda else 1)
    try:
        with torch.autocast(hr.device.type, enabled=False):
            for members in (order[i : i + chunk] for i in range(0, B, chunk)):
                lr[members] = degrade_with(hr[members], [draws[b] for b in members], randn, poisson, enlarged)
    finally:
        torch.set_num_threads(threads)
    return lr


# ---------------------------------------------------------------- sources of training pictures
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif")


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    """The numbers 0 .. n - 1 in the order of one epoch."""
    return torch.randperm(n, generator=keyed_generator("cpu", "permutation", seed, epoch)).tolist()


class Source:
    """Numbered pictures: files, or endless ones made by dead_leaves if there are no `names`."""

    def __init__(self, spec, names=()):
        self.spec, self.names, self.bad, self.small = spec, names, set(), set()  # numbers that are of no use
        self.limit = 0.01  # share of unreadable files above which training stops; one is always allowed

    def image(self, index, generator=None, side=256):
        """Picture -> uint8 (3, H, W), or ValueError; a made one follows from generator and side alone."""
        if not self.names:
            return dead_leaves(generator, side)
        return torch.from_numpy(decode(self.names[index], keep_16_bits=False)).permute(2, 0, 1)

    def choose(self, index, seed):
        """Candidates for sample `index` of a run: its picture, then the next; a new order every epoch."""
        n = len(self.names)
        return (permutation(n, seed, i // n)[i % n] for i in range(index, index + n)) if n else [index]


def pictures_in(folder):
    """Paths of all picture files below a folder, sorted; what is hidden is left out."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
                  and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def open_source(spec):
    """"procedural", a folder with sub-folders, or a text file with a path per line. Raises ValueError."""
    path, wanted = Path(spec), "give a folder, a list file, or procedural"
    if str(spec) == "procedural":
        return Source("procedural")
    if path.is_dir():
        names = pictures_in(path)
    elif path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{spec} is not a text file; {wanted}") from None
        names = [path.parent / line.strip() for line in lines if line.strip()]  # relative to the list
    else:
        raise ValueError(f"{spec} does not exist; {wanted}")
    if not names:
        raise ValueError(f"{spec} holds no pictures; {', '.join(SUFFIXES)} are read, tar files are not")
    return Source(str(spec), [str(name) for name in names])


def describe(source):
    """A line to print at opening: number of pictures, smallest side (of 200 of them), first three names."""
    if not source.names:
        return "procedural pictures, endless"
    sides = []
    for name in source.names[:: max(1, len(source.names) // 200)]:
        with suppress(*BROKEN), Image.open(name) as picture:  # it is reported when its turn comes
            sides.append(min(picture.size))
    smallest = f"smallest side {min(sides)} px" if sides else "none readable"
    return f"{source.spec}: {len(source.names)} pictures, {smallest}: {', '.join(source.names[:3])}, ..."


class Crops(torch.utils.data.Dataset):
    """The crops of a run as numbered samples, uint8 (3, R, R): functions of seed, number and source alone.

    So a run resumes with the next number, and any split of the numbers over ranks and workers gives the same
    crops. The next picture stands in for one that cannot be read (reported) or is smaller than R (counted).
    """

    def __init__(self, source, resolution, seed):
        self.source, self.resolution, self.seed = source, resolution, seed

    def __getitem__(self, index):
        source, side = self.source, self.resolution
        generator = keyed_generator("cpu", "crop", self.seed, index)
        for candidate in source.choose(index, self.seed):
            if candidate in source.small or candidate in source.bad:
                continue
            try:
                image = source.image(candidate, generator, side)
            except ValueError as reason:
                source.bad.add(candidate)
                print(f"unreadable: {reason}", flush=True)
                bad, n = len(source.bad), len(source.names)
                if bad > max(1, source.limit * n):
                    raise ValueError(f"{source.spec}: {bad} of {n} cannot be read, remove them") from None
                continue
            room = [n - side for n in image.shape[1:]]
            if min(room) >= 0:
                top, left = (int(torch.randint(n + 1, (), generator=generator)) for n in room)
                return image[:, top : top + side, left : left + side].contiguous()
            source.small.add(candidate)
        raise ValueError(f"{source.spec}: {len(source.small)} pictures are smaller than {side} px, "
                         f"{len(source.bad)} cannot be read, none is left; lower --resolution")


# ---------------------------------------------------------------- procedural pictures
font = functools.lru_cache(maxsize=128)(ImageFont.load_default)  # Pillow's own, by size


def spectral_noise(side, slope, generator):
    """(side, side) field of standard deviation 1 whose amplitude falls as 1 / frequency^slope."""
    f = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None])
    f[0, 0] = 1.0
    spectrum = torch.fft.rfft2(torch.randn(side, side, generator=generator)) / f**slope
    field = torch.fft.irfft2(spectrum, s=(side, side))
    return (field - field.mean()) / field.std()


def dead_leaves(generator, side=256):
    """A picture that needs no download: shapes of every size that hide one another -> uint8 (3, side, side).

    "Dead leaves" share the 1/f spectrum and the occlusion edges of photographs. Shapes are flat, textured,
    shaded or striped; some are outlines, some text. Drawn at twice the side and halved: smooth edges.
    """
    uniform, big = uniform_numbers(generator, 8192 + side * side // 8), 2 * side

    def fills():  # one of the few inks of this picture; amounts of the three patterns, 128 = none
        ink = inks[int(uniform(0, len(inks)))]
        patterns = (128 + (uniform(-120, 120) if uniform() < share else 0) for share in (0.6, 0.6, 0.15))
        return tuple(int(min(max(c + uniform(-25, 25), 0), 255)) for c in ink), tuple(map(int, patterns))

    tones = ((uniform(10, 245), 90 * uniform() ** 3) for _ in range(6))  # level, strength: mostly pale
    inks = [[level + uniform(-strength, strength) for _ in range(3)] for level, strength in tones]
    pictures = [Image.new("RGB", (big, big), fill) for fill in fills()]  # the same shapes: colours, patterns
    pens = [ImageDraw.Draw(picture) for picture in pictures]
    radii = [1 / uniform(1 / big, 1 / 4) for _ in range(40 + big * big // 1500)]  # density r^-2
    for _, r in sorted(((r * uniform(0.3, 3), r) for r in radii), reverse=True):  # large ones mostly behind
        x, y, kind, look = uniform(-r, big + r), uniform(-r, big + r), uniform(), fills()
        letters = [chr(int(uniform(65, 91)) + 32 * (uniform() < 0.6)) for _ in range(int(uniform(1, 9)))]
        # An ellipse, a rectangle, or a polygon without symmetry, turned.
        corners = 8 + int(r**0.5) if kind < 0.4 else 4 if kind < 0.7 else int(uniform(3, 9))
        flat, rough, turn, points = uniform(0.25, 1), 0.6 * (kind >= 0.7), uniform(0, 2 * math.pi), []
        cos, sin = math.cos(turn), math.sin(turn)
        for n in range(corners):
            angle, radius = 2 * math.pi * (n + uniform(0, rough)) / corners, r * (1 - uniform(0, rough))
            a, b = radius * math.cos(angle), flat * radius * math.sin(angle)
            points.append((x + a * cos - b * sin, y + a * sin + b * cos))
        how, width = uniform(), int(uniform(1, 2 + r / 8))
        for pen, fill in zip(pens, look, strict=True):
            if how < 0.06:
                pen.text((x - r, y - r / 2), "".join(letters), fill, font(int(min(max(r, 12), 90))))
            elif how < 0.2:
                pen.line(points[: corners // 2 + 1], fill, width, joint="curve")
            else:
                pen.polygon(points, fill)
    image, amount = (torch.from_numpy(np.array(p.reduce(2))).permute(2, 0, 1).float() for p in pictures)
    texture, shade, stripe = (amount - 128) / 120  # (side, side) each, in [-1, 1]
    across, turn = torch.linspace(-1, 1, side), uniform(0, math.pi)
    waves = (across * math.cos(turn) + across[:, None] * math.sin(turn)) * uniform(0.05, 0.45) * side
    image += 28 * texture * spectral_noise(side, uniform(0.4, 1.2), generator)
    image += 25 * shade * spectral_noise(side, 2.0, generator)
    image += 40 * stripe * torch.sin(waves + 2 * spectral_noise(side, 1.8, generator))
    light = 1 + uniform(0, 0.4) * (across * uniform(-1, 1) + across[:, None] * uniform(-1, 1))
    return (image * light + 0.5).clamp(0, 255).byte()


# ---------------------------------------------------------------- the contact sheet
def main(cfg):
    """`show`: a row per sample, HR | LR enlarged | what was drawn."""
    if len(cfg.inputs) != 2 or cfg.inputs[0] != "show":
        die("usage: python data.py show SOURCE; SOURCE is a folder, a list file or procedural")
    side = max(cfg.resolution, 256)
    sheet = Image.new("RGB", (2 * side + 560, cfg.rows * (side + 4)), "white")
    try:
        source = open_source(cfg.inputs[1])
        source.limit = 1.0  # a look at the data stops for no bad file
        print(describe(source))
        for row, top in enumerate(range(0, sheet.height, side + 4)):
            hr, key = Crops(source, cfg.resolution, cfg.seed)[row][None] / 255, ("show", cfg.seed, row)
            lr = degrade(hr, keyed_generator("cpu", *key), cfg.degradation)
            draws = draw_batch(1, *hr.shape[2:], keyed_generator("cpu", *key), cfg.degradation)[0]  # again
            for left, image in ((0, hr[0]), (side + 4, lr[0])):
                sheet.paste(to_pillow(image).resize((side, side), Image.Resampling.NEAREST), (left, top))
            text = re.sub(r"(\.\d\d)\d+|[{}']", r"\1", "\n".join(f"{k}: {v}" for k, v in draws.items()))
            ImageDraw.Draw(sheet).text((2 * side + 16, top), text, "black", font(13))
        sheet.save(cfg.out)
    except (ValueError, OSError) as reason:
        die(reason)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    main(cli(Config))
