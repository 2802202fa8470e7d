"""What is left of a picture after an autoencoder: the ceiling of a latent model, and the price of a decoder.

    python tools/roundtrip.py photos/                                           # of the bundled model
    python tools/roundtrip.py photos/ --vaes weights/tiny/vae,mine/tiny/vae     # two, in turn on each picture
    python tools/roundtrip.py photos/ --vaes weights/stable-diffusion-2-1-base/vae,weights/sd21_lwdecoder.pth

A .pth is a light decoder and takes the encoder of the folder before it. Pictures are cut to multiples of 8 px
and land as PNG in OUT/1/, OUT/2/, ..., where evaluate.py --from finds them (of photos that need no cut). The
time of a decoder is the median over the pictures of the fastest of --repeat runs, in float32.
"""
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, die, launch, validate
from data import open_source, write_image
from evaluate import METRICS, by_stem, read_pixels
from model import choose_device, load_vae

SCORES = {name: METRICS[name][1] for name in ("psnr_y", "ssim_y", "psnr_rgb", "coherence")}


@dataclass
class Config:
    vaes: str = "weights/tiny/vae"  # folders of autoencoders, light decoders (.pth), with commas between
    out: str = "out/roundtrip"  # folder of the pictures
    limit: int = 0  # only the first so many pictures; 0: all
    repeat: int = 3  # times that a picture is decoded
    device: str = "auto"  # cuda, mps, cpu in that order
    inputs: tuple = ()  # the photos: a folder or a list


def load_all(paths):
    """Autoencoders by their paths; a .pth replaces the decoder of the last folder."""
    loaded, folder = [], None
    for path in paths:
        if not path.endswith(".pth"):
            folder = path
        elif folder is None:
            raise ValueError(f"--vaes: {path} is a decoder, the folder of its autoencoder comes before it")
        loaded.append(load_vae(folder, path if path.endswith(".pth") else None))
    return loaded


def timed(decode, z, repeat):
    """Decoded picture and the fewest seconds of `repeat` runs."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        image = decode(z).float().cpu()                                         # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return image, min(seconds)


@torch.inference_mode()
def main():
    cfg = cli(Config)
    validate(cfg, limit=0, repeat=1)
    if len(cfg.inputs) != 1:
        die("one folder or list of photos is needed: python tools/roundtrip.py photos/")
    paths, source, device = cfg.vaes.split(","), open_source(cfg.inputs[0]), choose_device(cfg.device)
    if source.partners or source.count != len(source.names):
        die(f"{cfg.inputs[0]} is no folder and no list of photos")
    torch.backends.cudnn.allow_tf32 = False                                     # float32 means float32
    vaes = [vae.to(device).eval() for vae in load_all(paths)]
    rows, failed = [{name: [] for name in (*SCORES, "seconds", "megapixels")} for _ in vaes], []
    for stem, name in tqdm([*by_stem(source.names).items()][:cfg.limit or None], "pictures", disable=None):
        try:
            gt = read_pixels(name)
            gt = gt[:gt.shape[0] // 8 * 8, :gt.shape[1] // 8 * 8]
            if min(gt.shape) == 0:
                raise ValueError(f"{name} has a side below 8 px")
        except ValueError as error:
            failed.append(str(error))
            continue
        image = torch.from_numpy(gt).permute(2, 0, 1)[None].to(device) / 127.5 - 1
        for number, (vae, row) in enumerate(zip(vaes, rows, strict=True), start=1):
            back, seconds = timed(vae.decode, vae.encode(image), cfg.repeat)
            path = Path(cfg.out, str(number), f"{stem}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, back[0] * 0.5 + 0.5)
            back = read_pixels(path)
            for score, function in SCORES.items():
                row[score].append(function(back, gt))
            row["seconds"].append(seconds)
            row["megapixels"].append(gt.shape[0] * gt.shape[1] / 1e6)
    if not rows[0]["seconds"]:
        die(f"none of {len(failed)} pictures can be used; {failed[0]}")
    print(f"{len(rows[0]['seconds'])} pictures, {device}, {torch.get_num_threads()} threads")
    print("|", " | ".join(["autoencoder", "decoder, M", *SCORES, "ms per megapixel", "ratio"]), "|")
    print("|" + "---|" * (4 + len(SCORES)))
    speeds = [statistics.median(s / m for s, m in zip(row["seconds"], row["megapixels"], strict=True))
              for row in rows]
    for path, vae, row, speed in zip(paths, vaes, rows, speeds, strict=True):
        weights = sum(p.numel() for n, p in vae.named_parameters() if n.startswith(("decoder", "post_quant")))
        cells = [f"{statistics.fmean(row[name]):.3f}" for name in SCORES]
        print("|", " | ".join([path, f"{weights / 1e6:.2f}", *cells, f"{1e3 * speed:.0f}",
                               f"{speed / speeds[0]:.2f}"]), "|")
    if failed:
        print(f"{len(failed)} failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
