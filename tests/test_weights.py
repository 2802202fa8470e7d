"""The bundled model on the bundled photo: it restores, and every part of it matters."""
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import coherence, psnr_y, spec_hi, ssim_y
from sample import load, upscale

ROOT = Path(__file__).parent.parent


@cache
def pictures():
    return (Image.open(ROOT / "assets" / "input.png").convert("RGB"),
            np.array(Image.open(ROOT / "assets" / "original.png").convert("RGB")))


def scores(picture):
    """PSNR-Y, SSIM-Y, coherence and high-band power of a PIL image against the bundled original."""
    sr, hr = np.array(picture), pictures()[1]
    return dict(psnr=psnr_y(sr, hr), ssim=ssim_y(sr, hr), coherence=coherence(sr, hr), power=spec_hi(sr, hr))


def restored(vosr, steps):
    """Without the colour fix, whose low frequencies of the input would hide a wrong network."""
    return scores(upscale(pictures()[0], vosr, steps=steps, cfg_scale=1.0, color="none"))


@cache
def intact(steps):
    return restored(load("tiny", steps, weights=ROOT / "weights"), steps)


def test_one_step_beats_bicubic_on_the_bundled_photo():
    lr = pictures()[0]
    bicubic = scores(lr.resize((512, 512), Image.Resampling.BICUBIC))
    ours = scores(upscale(lr, load("tiny", 1, weights=ROOT / "weights"), name="input.png"))
    assert ours["psnr"] > bicubic["psnr"] and ours["ssim"] > bicubic["ssim"] + 0.005
    assert ours["coherence"] > bicubic["coherence"] and bicubic["power"] + 2 < ours["power"] < 0


@pytest.mark.slow
def test_ten_steps_invent_more_detail_than_one():
    assert intact(1)["power"] + 1 < intact(10)["power"] < 0
    assert intact(10)["psnr"] > intact(1)["psnr"] - 2


def test_without_the_velocity_of_the_network_the_picture_is_lost():
    vosr = load("tiny", 1, weights=ROOT / "weights")
    vosr.velocity = lambda z_t, *_: torch.zeros_like(z_t)
    lost = restored(vosr, 1)
    assert lost["psnr"] < intact(1)["psnr"] - 5 and lost["coherence"] < 0.03


@pytest.mark.parametrize("steps", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_with_the_structure_of_another_picture_the_scores_fall_far(steps):
    vosr = load("tiny", steps, weights=ROOT / "weights")
    encode = vosr.encode
    vosr.encode = lambda image, noise=None: encode(image.flip(-1), noise)      # its own mirror image
    wrong = restored(vosr, steps)
    assert wrong["psnr"] < intact(steps)["psnr"] - 5 and wrong["coherence"] < 0.03


def test_guidance_and_alpha_change_the_multi_step_result_and_the_seed_changes_the_noise():
    vosr = load("tiny", 10, weights=ROOT / "weights")
    lr = pictures()[0].crop((40, 20, 72, 52))

    def sr(**options):
        return np.array(upscale(lr, vosr, steps=5, **options)).astype(int)

    base = sr(cfg_scale=0.5)
    assert np.array_equal(base, sr(cfg_scale=0.5))
    for other in (sr(cfg_scale=1.0), sr(cfg_scale=0.5, alpha=0.25), sr(cfg_scale=0.5, seed=7)):
        assert np.abs(base - other).mean() > 0.1


def likeness(a, b):
    """PSNR of two pictures in dB, both reduced to the size of b."""
    a, b = (np.asarray(x.resize(b.size, Image.Resampling.BOX), float) for x in (a, b))
    return 10 * np.log10(255**2 / ((a - b) ** 2).mean())


@pytest.mark.slow
def test_each_knob_moves_the_picture_in_the_stated_direction():
    one, many = (load("tiny", steps, weights=ROOT / "weights") for steps in (1, 25))
    lr, hr = pictures()[0].crop((30, 10, 94, 74)), Image.fromarray(pictures()[1]).crop((120, 40, 376, 296))
    fidelity = [likeness(upscale(lr, one, fidelity=f), hr) for f in (0.0, 0.5, 1.0)]
    scale = [likeness(upscale(lr, many, steps=6, cfg_scale=s), lr) for s in (-0.5, 0.0, 0.5, 1.0)]
    alpha = [likeness(upscale(lr, many, steps=6, cfg_scale=0.0, alpha=a), lr) for a in (0.05, 0.1, 0.25)]
    colour = [likeness(upscale(lr, one, color=c), lr.resize((8, 8))) for c in ("none", "adain", "wavelet")]
    for values in (fidelity, scale, alpha, colour):
        assert values == sorted(set(values)), values
