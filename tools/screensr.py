"""Real-world pairs by photographing a screen: the page to show, and its photo put back onto the picture.

    python tools/screensr.py make photos/*.png -o pages/        # pages/NAME_screen.png: show, photograph
    python tools/screensr.py make cat.png --canvas 3840x2160    # a page that fills the screen
    python tools/screensr.py align IMG_1.jpg cat.png IMG_2.jpg dog.png -o ScreenSR/ --size 512
    python evaluate.py --protocol screensr --data ScreenSR/

As ScreenSR was made (paper A.2): `make` puts the picture on a white page, an ArUco marker off each corner.
`align` finds the markers in a photo of that page, samples the photo on the picture's own pixels, gives it the
picture's low frequencies, and writes OUT/HR/NAME.png and OUT/LR/NAME.png, of one size, by the picture's name.
`align` needs OpenCV (pip install opencv-python-headless), `make` does not.

Show the page at 100 %; photograph all of it, sharp, without glare, turned as you like. The picture's size
alone decides where the markers are: `align` needs no option of `make`, and a larger page changes nothing.
"""
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, die, launch
from data import MAX_PIXELS, SUFFIXES, on_white, open_picture, split_picture, to_pillow, write_image
from sample import low_band, wavelet

# Markers 0 to 3 of OpenCV's DICT_4X4_50, clockwise: 4 x 4 bits, row by row, in a black frame of one cell.
MARKERS = {"top left": 0xB532, "top right": 0x0F9A, "bottom right": 0x332D, "bottom left": 0x9946}
CELLS, GAP, MARGIN = 6, 1, 2  # in cells: side of a marker, white between it and the picture, white outside
OUTWARD = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])  # of a square's corners, in their order


@dataclass
class Config:
    canvas: str = ""  # make: WIDTHxHEIGHT of the page, such as the screen's; default: as small as it can be
    size: int = 0  # align: side of the pair, the central square reduced (paper: 512); 0: the picture as it is
    max_error: float = 1.0  # align: refuse if the marker corners miss by more pixels of the pair on average
    max_pixels: int = MAX_PIXELS  # larger pictures are refused
    out: str = ""  # folder (also -o); default: make beside the picture, align ScreenSR
    inputs: tuple = ()  # make IMAGE ..., or align PHOTO SOURCE PHOTO SOURCE ...


def read(path, cfg):
    """Image file -> upright 8-bit RGB, transparency on white, and the profile of its colours. ValueError."""
    picture = split_picture(open_picture(path, cfg.max_pixels))
    return on_white(picture.rgb, picture.alpha), None if picture.grey else picture.icc


# ---------------------------------------------------------------- the page
def marker_corners(width, height):
    """Side of a cell, and the corners (4, 4, 2) of the markers, each clockwise from its top left.

    In pixels of the picture, which begins at (0, 0). A marker has an eighth of its long side, at least 48.
    """
    cell, centre = max(8, round(max(width, height) / (8 * CELLS))), np.array([width, height]) / 2
    middles = centre + OUTWARD * (centre + (GAP + CELLS / 2) * cell)
    return cell, middles[:, None] + OUTWARD * (CELLS / 2 * cell)


def make(image, target, cfg):
    """The page of a picture, from file to file. ValueError if it does not fit on --canvas."""
    rgb, icc = read(image, cfg)
    cell, markers = marker_corners(*rgb.size)
    least = np.add(rgb.size, 2 * (GAP + CELLS + MARGIN) * cell)
    canvas = [int(n) for n in cfg.canvas.split("x")] if cfg.canvas else least.tolist()
    if (least > canvas).any():
        raise ValueError(f"its page takes {least[0]}x{least[1]} px, --canvas has {cfg.canvas}")
    page, (left, top) = Image.new("RGB", canvas, "white"), np.subtract(canvas, rgb.size) // 2
    page.paste(rgb, (left, top))
    for bits, ((x, y), *_) in zip(MARKERS.values(), markers, strict=True):
        inner = np.array([bits >> n & 1 for n in reversed(range(16))], np.uint8).reshape(4, 4) * 255
        marker = Image.fromarray(np.pad(inner, 1)).resize([CELLS * cell] * 2, Image.Resampling.NEAREST)
        page.paste(marker, (left + round(x), top + round(y)))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_image(target, page, icc=icc)
    print(f"{image}  {rgb.width}x{rgb.height} -> {page.width}x{page.height}  {target}", flush=True)


# ---------------------------------------------------------------- where the page is in the photo
# Positions are continuous: (0, 0) is the outer corner of the first pixel. OpenCV counts from its centre.
def opencv():
    """The module cv2, an extra that only `align` needs."""
    try:
        import cv2
        return cv2.aruco.ArucoDetector and cv2
    except (ImportError, AttributeError):
        die("align needs OpenCV, 4.7 or newer: pip install opencv-python-headless")


def edges(corners):
    """Corners (..., 4, 2) of a quadrangle -> the lengths (..., 4) of its sides."""
    return np.linalg.norm(np.roll(corners, -1, -2) - corners, axis=-1)


def find_markers(photo):
    """Photo (H, W, 3) uint8 -> corners (4, 4, 2) in its pixels, ordered as by marker_corners. ValueError."""
    cv2, found = opencv(), {}
    grey, full = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), np.array(photo.shape[1::-1])
    settings = cv2.aruco.DetectorParameters()
    settings.adaptiveThreshWinSizeMax = 63  # finds larger markers and softer edges than the default
    settings.perspectiveRemovePixelPerCell, settings.perspectiveRemoveIgnoredMarginPerCell = 8, 0.3
    detector = cv2.aruco.ArucoDetector(cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50), settings)
    for longest in (1600, 800, full.max()):  # reduced, the photo has less noise and moire
        if len(found) == 4:
            break
        size = np.ceil(full * min(1, longest / full.max())).astype(int)
        small = cv2.resize(grey, size.tolist(), interpolation=cv2.INTER_AREA)
        squares, ids, _ = detector.detectMarkers(small)
        ids = [] if ids is None else ids.ravel().tolist()
        for n, name in enumerate(MARKERS):
            if ids.count(n) > 1:
                raise ValueError(f"two {name} markers found; photograph one page at a time")
            if n in ids:
                found.setdefault(n, (squares[ids.index(n)].reshape(4, 2) + 0.5) * full / size)
    if missing := [name for n, name in enumerate(MARKERS) if n not in found]:
        raise ValueError(f"{len(found)} of 4 markers found (missing: {', '.join(missing)}); photograph all "
                         "of the page, sharp and without glare")
    for n, square in found.items():  # refined in the full photo, by what lies within half a cell
        reach = max(3, round(edges(square).min() / CELLS / 2))
        start, rule = (square[:, None] - 0.5).astype(np.float32), (3, 100, 1e-3)  # 3: both limits hold
        found[n] = cv2.cornerSubPix(grey, start, (reach, reach), (-1, -1), rule)[:, 0] + 0.5
    return np.stack([found[n] for n in range(4)])


def project(p, scale, centre, points, outward=0):
    """Pixels of the picture (N, 2) -> pixels of the photo (N, 2), by the ten numbers p of `fit`."""
    flat = np.column_stack([(points + p[9] * outward) / scale, np.ones(len(points))])
    flat = flat @ np.append(p[:8], 1).reshape(3, 3).T
    flat = flat[:, :2] / flat[:, 2:]
    return centre + np.linalg.norm(centre) * flat * (1 + p[8] * (flat**2).sum(1, keepdims=True))


def fit(corners, picture, photo):
    """Marker corners (4, 4, 2) in a photo; sizes (width, height) of picture and photo -> map, error.

    The map takes pixels of the picture (N, 2) to those of the photo. The error is the mean distance of the
    corners from it, in pixels of the picture; nan if there is none. Least squares for a homography, a radial
    coefficient of the lens, and a width by which bright light has spilled over the edges of the markers.
    Without the third the second would be wrong, and the picture's middle off by a pixel or two.
    """
    known, seen, outward = marker_corners(*picture)[1], corners.reshape(-1, 2), np.tile(OUTWARD, (4, 1))
    ratio, known = edges(known).mean() / edges(corners).mean(), known.reshape(-1, 2)
    scale, centre, h = max(picture), np.array(photo) / 2, 1e-6
    start, _ = opencv().findHomography(known / scale, (seen - centre) / np.linalg.norm(centre))
    p = np.append(np.full(8, np.nan) if start is None else start.ravel()[:8], [0, 0])
    for _ in range(10):  # Gauss-Newton
        miss = seen - project(p, scale, centre, known, outward)
        if not np.isfinite(miss).all():
            break
        moved = [seen - project(p + step, scale, centre, known, outward) for step in h * np.eye(10)]
        p = p + np.linalg.lstsq(np.stack([(miss - m).ravel() / h for m in moved], 1), miss.ravel())[0]
    return partial(project, p, scale, centre), float(np.linalg.norm(miss, axis=1).mean() * ratio)


# ---------------------------------------------------------------- the pair
def resample(photo, place, box, size):
    """Photo (H, W, 3) uint8 -> `box` of the picture at size (w, h), as (3, h, w) in [0, 1]; pixels per pixel.

    A pixel is the mean of k x k bicubic samples, and k so large that none of the photo's pixels is skipped.
    """
    corners = np.array([box[:2], (box[2], box[1]), box[2:], (box[0], box[3])])
    scale = (edges(place(corners)) / np.tile(size, 2)).max()
    k = max(1, int(np.ceil(scale - 0.01)))
    x, y = (low + (np.arange(n * k) + 0.5) / (n * k) * (high - low)
            for low, high, n in zip(box[:2], box[2:], size, strict=True))
    out, rows = np.empty((size[1], size[0], 3), np.float32), max(1, 2**20 // (len(x) * k))
    for row in range(0, size[1], rows):  # in bands, for the memory
        points = np.stack(np.meshgrid(x, y[row * k : (row + rows) * k]), -1)
        at = place(points.reshape(-1, 2)).reshape(points.shape).astype(np.float32) - 0.5
        samples = opencv().remap(photo, at, None, opencv().INTER_CUBIC)
        out[row : row + rows] = samples.reshape(-1, k, size[0], k, 3).mean((1, 3))
    return torch.from_numpy(out).permute(2, 0, 1) / 255, scale


def align(photo, source, hr_path, lr_path, cfg):
    """One pair, from files to files. ValueError if the photo does not show the page of the source."""
    (rgb, icc), shot = read(source, cfg), np.asarray(read(photo, cfg)[0])
    part = (min(rgb.size),) * 2 if cfg.size else rgb.size  # central part of the source that makes the pair
    size = (cfg.size,) * 2 if cfg.size else part
    if size > part:
        raise ValueError(f"{source} is {rgb.width}x{rgb.height}, --size {cfg.size} would enlarge it")
    box = (*(low := np.subtract(rgb.size, part) // 2), *(low + part))
    place, error = fit(find_markers(shot), rgb.size, shot.shape[1::-1])
    if not (error := error * size[0] / part[0]) <= cfg.max_error:
        raise ValueError(f"its marker corners miss by {error:.2f} px, --max_error allows {cfg.max_error:g}: "
                         f"the page of a picture of another shape than {source}, or a bent screen")
    rgb = rgb.crop(box).resize(size, Image.Resampling.LANCZOS)
    hr = torch.from_numpy(np.array(rgb)).permute(2, 0, 1) / 255
    lr, scale = resample(shot, place, box, size)
    detail, wanted = (image - low_band(image) for image in (lr, hr))
    same = (detail * wanted).mean() / (detail.std() * wanted.std() + 1e-9)
    if same < 0.1 and wanted.std() > 2 / 255:  # another picture has 0.0; without detail nobody knows
        raise ValueError(f"no trace of {source} between its markers (correlation {same:.2f}): the page of "
                         "another picture, or far out of focus")
    aligned = wavelet(lr, hr)
    for path, picture in ((hr_path, rgb), (lr_path, to_pillow(aligned))):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, picture, icc=icc)
    print(f"{photo}  {size[0]}x{size[1]} from {scale:.1f} px per px  corners off by {error:.3f} px  colours "
          f"moved by {255 * (aligned - lr).abs().mean():.1f} levels  {lr_path}", flush=True)


def plan(cfg):
    """The call as jobs (function, sources, targets); a wrong one ends here, before work starts."""
    command, *names = cfg.inputs or ("",)
    if command not in ("make", "align") or not names or (command == "align" and len(names) % 2):
        die("usage: python tools/screensr.py make IMAGE ..., or align PHOTO SOURCE PHOTO SOURCE ...")
    if cfg.canvas and not re.fullmatch("[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", cfg.canvas):
        die(f"--canvas wants WIDTHxHEIGHT such as 3840x2160, 9999 at most, got {cfg.canvas!r}")
    if cfg.size < 0 or not cfg.max_error > 0:
        die(f"--size starts at 0 and --max_error above it, got {cfg.size} and {cfg.max_error:g}")
    if Path(cfg.out).suffix.lower() in SUFFIXES or Path(cfg.out).is_file():
        die(f"--out wants a folder, got {cfg.out}")
    paths, folder = [Path(name) for name in names], Path(cfg.out or "ScreenSR")
    if command == "make":
        jobs = [(make, (p,), (Path(cfg.out or p.parent, f"{p.stem}_screen.png"),)) for p in paths]
    elif opencv():
        jobs = [(align, (photo, source), tuple(folder / kind / f"{source.stem}.png" for kind in ("HR", "LR")))
                for photo, source in zip(paths[::2], paths[1::2], strict=True)]
    taken = dict.fromkeys((p.resolve() for p in paths), "which is an input")
    for _, sources, targets in jobs:
        for target in targets:
            if was := taken.get(target.resolve()):
                die(f"{sources[0]} would be written to {target}, {was}; name another folder with -o")
            taken[target.resolve()] = f"as would {sources[0]}"
    return jobs


def main():
    cfg = cli(Config)
    jobs, failed = plan(cfg), []
    for work, sources, targets in jobs:
        try:
            work(*sources, *targets, cfg)
        except (ValueError, OSError, MemoryError) as reason:
            line = str(reason) or "not enough memory"
            line = line if line.startswith(tuple(map(str, sources))) else f"{sources[0]}: {line}"
            failed.append(str(sources[0]))
            print("error:", line, file=sys.stderr)
    if failed:
        sys.exit(2 if len(jobs) == 1 else f"error: {len(failed)} of {len(jobs)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    launch(main)
