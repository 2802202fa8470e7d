"""The bundled model on the bundled photo: it restores, and every part of it matters."""
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import coherence, psnr_y
from sample import load, upscale

ROOT = Path(__file__).parent.parent


@cache
def pictures():
    return (Image.open(ROOT / "assets" / "input.png").convert("RGB"),
            np.array(Image.open(ROOT / "assets" / "original.png").convert("RGB")))


def scores(vosr, steps=1, **options):
    """PSNR-Y and coherence of the bundled photo, without the colour fix, which would hide a wrong network."""
    lr, hr = pictures()
    sr = np.array(upscale(lr, vosr, steps=steps, color="none", **options))
    return psnr_y(sr, hr), coherence(sr, hr)


@cache
def intact(steps):
    return scores(load("tiny", steps, weights=ROOT / "weights"), steps)


@pytest.mark.parametrize("steps", [1, 10])
def test_it_finds_more_of_the_true_detail_than_bicubic(steps):
    lr, hr = pictures()
    bicubic = np.array(lr.resize((512, 512), Image.Resampling.BICUBIC))
    psnr, detail = intact(steps)
    assert detail > coherence(bicubic, hr) + 0.02
    assert psnr > psnr_y(bicubic, hr) - 3


def test_without_the_velocity_of_the_network_the_picture_is_lost():
    vosr = load("tiny", 1, weights=ROOT / "weights")
    vosr.velocity = lambda z_t, *_: torch.zeros_like(z_t)
    assert scores(vosr)[0] < intact(1)[0] - 5


@pytest.mark.parametrize("steps", [1, 10])
def test_with_the_structure_of_another_picture_the_scores_fall_far(steps):
    vosr = load("tiny", steps, weights=ROOT / "weights")
    encode = vosr.encode
    vosr.encode = lambda image, noise=None: encode(image.flip(-1), noise)      # its own mirror image
    psnr, detail = scores(vosr, steps)
    assert psnr < intact(steps)[0] - 5 and detail < intact(steps)[1] - 0.02


def test_guidance_and_alpha_change_the_multi_step_result_and_the_seed_changes_the_noise():
    vosr = load("tiny", 10, weights=ROOT / "weights")
    lr = pictures()[0].crop((40, 20, 72, 52))

    def sr(**options):
        return np.array(upscale(lr, vosr, steps=5, **options)).astype(int)

    base = sr(cfg_scale=0.5)
    assert np.array_equal(base, sr(cfg_scale=0.5))
    for other in (sr(cfg_scale=1.0), sr(cfg_scale=0.5, alpha=0.25), sr(cfg_scale=0.5, seed=7)):
        assert np.abs(base - other).mean() > 0.1
