"""Sampler, tiles, colour, pictures of any kind, models: on a small random model of the tiny family."""
import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file

import sample
from model import VOSR, DiT, ModelConfig, TinyAutoencoder, TinySemanticEncoder
from sample import adain, euler, load, tile_layout, time_grid, upscale, wavelet


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(width, height, mode="RGB", bands=3):
    """A smooth random picture: coarse noise, enlarged."""
    size = (bands, 2 + height // 8, 2 + width // 8)
    coarse = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    smooth = [Image.fromarray(band).resize((width, height), Image.Resampling.BICUBIC) for band in coarse]
    return Image.merge(mode, smooth) if bands > 1 else smooth[0]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weights folder with a random family: the networks of tiny, narrower, no zero that hides a part."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("weights")

    def write(folder, net, name, config):
        for seed, tensor in enumerate(net.parameters()):
            tensor.data = random(*tensor.shape, seed=seed) * 0.6 / max(1, tensor[0].numel()) ** 0.5
        (root / folder).mkdir(parents=True)
        save_file(net.state_dict(), root / folder / "model.safetensors")
        (root / folder / name).write_text(json.dumps(config))

    write("tiny/vae", TinyAutoencoder(16, (8, 8)), "config.json", {"latent_channels": 16, "widths": [8, 8]})
    write("tiny/semantic", TinySemanticEncoder(16), "config.json", {"enc_dim": 16})
    for name, one_step in (("ms", False), ("os", True)):
        cfg = ModelConfig(dim=32, depth=1, num_heads=1, enc_dim=16, resolution=128, ae_type="tiny",
                          auxiliary_time_cond=one_step)
        write(f"tiny/{name}", DiT(cfg), "args.json", asdict(cfg) | {"tau": 0.75 if one_step else 1.0})
    return root


@pytest.fixture(scope="session")
def student(weights):
    return load("tiny", 1, weights, device="cpu")


@pytest.fixture(scope="session")
def teacher(weights):
    return load("tiny", 25, weights, device="cpu")


@pytest.mark.parametrize("steps", [1, 25])
def test_exact_velocity_reaches_z0(steps):
    """On the straight path z_t = (1 - t) z0 + t noise the velocity is noise - z0 everywhere."""
    z0, noise = random(2, 4, 6, 8), random(2, 4, 6, 8, seed=1)
    for cfg_scale in (None, 0.5, 1.0):
        z = euler(lambda z, *_, **r: (noise - z0).repeat(len(z) // 2, 1, 1, 1), noise, z0,
                  torch.zeros(2, 1, 3), time_grid(steps), cfg_scale=cfg_scale)
        assert torch.allclose(z, z0, atol=1e-5)


def test_guidance_goes_from_the_partial_to_the_full_branch():
    """A network that returns c_str = 2 differs between the branches by alpha; one step from 0 gives -v."""
    c_str, zero = torch.full((1, 4, 2, 2), 2.0), torch.zeros(1, 4, 2, 2)
    for cfg_scale, v in ((0.0, 0.2), (1.0, 2.0), (0.5, 1.1), (-0.5, -0.7)):
        z = euler(lambda z, t, c, s: c, zero, c_str, torch.ones(1, 1, 1), time_grid(1), 0.1, cfg_scale)
        assert torch.allclose(z, zero - v, atol=1e-6)


def test_tiles_cover_every_length():
    for length, tile in itertools.product(range(1, 40), (4, 8, 16)):
        starts = tile_layout(length, tile, tile // 4)
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] + min(tile, length) == length
        assert all(b - a <= tile - tile // 4 for a, b in itertools.pairwise(starts))


def test_tiles_of_a_network_without_neighbourhood_equal_the_whole():
    def net(z, t, c_str, c_sem, r=None):
        extra = torch.zeros(len(z), 1, 1, 1)
        extra[:len(c_sem)] = c_sem[0]
        return z * t.view(-1, 1, 1, 1) + c_str + extra

    z, c_str, tokens = random(1, 4, 12, 20), random(1, 4, 12, 20, seed=1), [1.5]
    places = list(itertools.product(tile_layout(12, 8, 2), tile_layout(20, 6, 2)))
    for cfg_scale, batch in itertools.product((None, 0.5), (1, 4)):
        whole = euler(net, z, c_str, tokens, time_grid(3), 0.1, cfg_scale)
        field = sample.tiled(net, places, 8, 6, lambda some: tokens * len(some), batch)
        parts = euler(field, z, c_str, [], time_grid(3), 0.1, cfg_scale)
        assert torch.allclose(parts, whole, atol=1e-5)


def test_assembled_pieces_are_seamless():
    """Pieces that are wrong up to 48 pixels from a border, not the picture's own, still give the whole."""
    whole = random(3, 70 * 8, 90 * 8)

    def piece(top, left, h, w):
        part = whole[:, 8 * top:8 * (top + h), 8 * left:8 * (left + w)].clone()
        part[:, :48 * bool(top)] = part[..., :48 * bool(left)] = 1e6
        part[:, 8 * h - 48 * (top + h < 70):] = part[..., 8 * w - 48 * (left + w < 90):] = 1e6
        return part

    bands = list(sample.assemble(piece, 70, 90, 32))
    assert [top for top, _ in bands] == [0, *itertools.accumulate(b.shape[1] for _, b in bands[:-1])]
    assert torch.allclose(torch.cat([band for _, band in bands], dim=1), whole, atol=1e-5)


def test_one_tile_equals_no_tile_and_more_tiles_share_the_noise(student, teacher):
    for vosr, steps in ((student, 1), (teacher, 5)):
        whole, one, four, other = (
            np.asarray(upscale(picture(75, 60), vosr, steps=steps, tile=tile, seed=seed), float)
            for tile, seed in ((0, 42), (304, 42), (256, 42), (0, 1)))
        assert np.array_equal(whole, one)
        assert 0 < abs(four - whole).mean() < 0.5 * abs(other - whole).mean()


def test_colour_fixes_reach_a_flat_reference_and_leave_the_reference_alone():
    flat, other = torch.full((3, 24, 40), 0.25), torch.full((3, 24, 40), 0.75)
    image = torch.from_numpy(np.array(picture(50, 41))).permute(2, 0, 1) / 255
    assert torch.allclose(wavelet(flat, other), other, atol=1e-5)
    assert torch.allclose(wavelet(image, image), image, atol=1e-5)
    assert wavelet(image[:, :1, :1], flat[:, :1, :1]).isfinite().all()
    levels = adain(Image.new("RGB", (5, 4), (9, 9, 9)), Image.new("RGB", (7, 1), (1, 2, 3)))
    assert torch.allclose(levels[:, 9] * 255, torch.tensor([1.0, 2.0, 3.0]), atol=1e-3)
    assert torch.allclose(adain(picture(50, 41), picture(50, 41)), torch.arange(256) / 255, atol=1e-5)


@pytest.mark.parametrize("width, height, scale", [
    (1, 1, 4), (1, 50, 4), (50, 1, 2.5), (123, 77, 4), (16, 16, 4), (40, 24, 1), (31, 9, 2.5), (5, 7, 1.3),
    (64, 3, 7)])
def test_every_size_and_scale_is_exact(student, width, height, scale):
    result = upscale(picture(width, height), student, scale)
    assert result.mode == "RGB" and result.size == (round(scale * width), round(scale * height))


def test_noise_follows_seed_and_name_and_fidelity_scales_it(student):
    image = picture(20, 30)
    first = upscale(image, student, name="a")
    assert upscale(image, student, name="between", color="adain", size=(33, 77)).size == (33, 77)
    assert np.array_equal(first, upscale(image, student, name="a"))
    for options in (dict(name="b"), dict(name="a", seed=1), dict(name="a", fidelity=0.5)):
        assert not np.array_equal(first, upscale(image, student, **options))
    assert student.tau == 0.75
    assert np.array_equal(*(upscale(image, student, seed=s, fidelity=1.0) for s in (1, 2)))


@pytest.mark.parametrize("mode, becomes", [
    ("L", "L"), ("1", "L"), ("I;16", "L"), ("LA", "LA"), ("RGBA", "RGBA"), ("P", "RGBA"), ("CMYK", "RGB")])
def test_modes(student, mode, becomes):
    grey, image = picture(12, 10, bands=1), picture(12, 10, "RGBA", 4)
    image = Image.fromarray(np.asarray(grey) * np.uint16(257)) if mode == "I;16" else image.convert(mode)
    result = upscale(image, student)
    assert result.mode == becomes and result.size == (48, 40)
    if mode == "I;16":
        assert np.array_equal(result, upscale(grey, student))
    if mode == "RGBA":  # the colours do not depend on alpha
        assert np.array_equal(result.convert("RGB"), upscale(image.convert("RGB"), student))
        alpha = image.getchannel("A").resize((48, 40), Image.Resampling.BICUBIC)
        assert np.array_equal(result.getchannel("A"), alpha)


def test_orientation_is_applied_profile_kept_unknown_ranges_refused(student, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(24, 16).save(tmp_path / "a.jpg", exif=exif, icc_profile=profile)
    result = upscale(Image.open(tmp_path / "a.jpg"), student)
    assert result.size == (64, 96) and result.info["icc_profile"] == profile and not result.getexif()
    for image in (Image.new("F", (4, 4)), Image.fromarray(np.full((4, 4), 1 << 20, np.int32))):
        with pytest.raises(ValueError, match="unknown range"):
            upscale(image, student)


def test_result_that_is_not_finite_is_computed_again_in_fp32(weights, student, monkeypatch, capsys):
    """Weights that were rounded on loading are read again: the result is that of fp32, bit by bit."""
    velocity, image = VOSR.velocity, picture(10, 10)
    expected, student = upscale(image, student, name="x.png"), load("tiny", 1, weights, "bf16", "cpu")
    monkeypatch.setattr(VOSR, "velocity", lambda self, *rest: velocity(self, *rest) * (
        float("nan") if torch.is_autocast_enabled("cpu") else 1))
    assert np.array_equal(expected, upscale(image, student, name="x.png"))
    assert "x.png" in capsys.readouterr().err
    monkeypatch.setattr(VOSR, "velocity", lambda self, z, *rest: z * float("nan"))
    with pytest.raises(FloatingPointError):
        upscale(image, student)


def test_steps_choose_the_network_and_only_the_multi_step_one_is_guided(weights, student, teacher):
    assert load("tiny", 4, weights).one_step and not load("tiny", 5, weights).one_step
    assert load("tiny-os", 25, weights).one_step and not load(str(weights / "tiny/ms"), 1, weights).one_step
    for options in (dict(cfg_scale=2.0), dict(alpha=0.25)):
        for vosr, same in ((student, True), (teacher, False)):
            both = (dict(cfg_scale=0.5), dict(cfg_scale=0.5) | options)
            results = [upscale(picture(16, 16), vosr, steps=5, **o) for o in both]
            assert np.array_equal(*results) == same


def test_run_folder_of_a_training_is_a_model(weights, teacher, tmp_path):
    """train.py keeps the semantic encoder in the same file and names the newest checkpoint in `last`."""
    step, own = tmp_path / "step-00001000", TinySemanticEncoder(16)
    step.mkdir()
    beside = {f"semantic_encoder.{n}": v for n, v in own.state_dict().items()}
    save_file(teacher.dit.state_dict() | beside, step / "ema_model.safetensors")
    (step / "args.json").write_text((weights / "tiny/ms/args.json").read_text())
    (tmp_path / "last").write_text("step-00001000\n")
    for name in (tmp_path, tmp_path / "last", step):
        vosr = load(str(name), 25, weights)
        assert not vosr.one_step and torch.equal(vosr.semantic_encoder.mix.weight, own.mix.weight)
        assert vosr.defaults["cfg_scale"] == 1.0                              # as of the family tiny


def test_missing_weights_are_listed(weights, tmp_path):
    with pytest.raises(ValueError, match=r"tools/download\.py 0\.5B-os --weights") as error:
        load("0.5B", 1, tmp_path)
    assert str(error.value).count(f"{tmp_path}/") == 6  # DiT and VAE: two files each; light decoder, DINOv2
    assert "stable-diffusion-2-1-base/vae/diffusion_pytorch_model.safetensors" in str(error.value)
    with pytest.raises(ValueError, match="cpu would work"):
        load("tiny", 1, weights, device="tpu")
