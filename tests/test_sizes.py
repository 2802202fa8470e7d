"""Any size in, the exact size out; tiles without seams; a picture alone or among others is the same."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import test_published
import test_sample
import torch
from PIL import Image
from test_sample import picture, random

import sample
from data import dead_leaves, keyed_generator
from model import VOSR, AutoencoderKL, ModelConfig
from sample import load, passes, ready, shared_norms, tile_layout, upscale

weights, student, teacher = test_sample.weights, test_sample.student, test_sample.teacher  # fixtures
published = test_published.weights
ROOT = Path(__file__).parent.parent


class Stub(torch.nn.Module):
    """Networks that do as little as possible: the latent is the mean of 8 x 8 pixels, the velocity 0."""

    def __init__(self):
        super().__init__()
        self.cfg, self.channels = ModelConfig(ae_type="sd2", auxiliary_time_cond=True), 3
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, image, noise=None):
        return torch.nn.functional.avg_pool2d(image, 8)

    def decode(self, z):
        return torch.nn.functional.interpolate(z, scale_factor=8.0)

    def semantics(self, c_sem):
        return c_sem

    def forward(self, x, *rest, **named):
        return x[:, :, 0, :1] if not rest else 0 * x


@pytest.fixture(scope="module")
def stub():
    return ready(VOSR(Stub(), Stub(), Stub()), device="cpu")


def test_size_arithmetic_for_all_small_sides_and_factors():
    """Every pass enlarges by at most 4, the last one is exact; below x4 there is one."""
    for width, factor in itertools.product(range(1, 131), (1, 1.5, 2, 3, 4, 6)):
        for height in {1, 7, width, 131 - width, 130}:
            wanted = (max(1, round(width * factor)), max(1, round(height * factor)))
            steps = list(passes((width, height), wanted))
            assert steps[-1] == wanted and len(steps) == (2 if factor == 6 else 1)
            for old, new in itertools.pairwise([(width, height), *steps]):
                assert all(n <= 4 * o for o, n in zip(old, new, strict=True))
    assert len(list(passes((10, 10), (1000, 10)))) == math.ceil(math.log(100, 4))


@pytest.mark.slow
def test_200_drawn_combinations_of_sizes_and_tiles_come_out_exact(stub):
    draw = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(n) for n in draw.integers(1, 131, 2))
        factor, tile = float(draw.choice([1, 1.5, 2, 3, 4, 6])), int(draw.choice([0, 64, 96, 256]))
        image = Image.new("RGB", (width, height), "teal")
        result = upscale(image, stub, scale=factor, tile=tile, color="none")
        assert result.size == (round(width * factor), round(height * factor))


@pytest.mark.parametrize("size, scale, tile", [
    ((1, 1), 4, 512), ((1, 50), 4, 64), ((50, 1), 2.5, 64), ((33, 17), 3, 64), ((16, 16), 1, 512),
    ((17, 16), 1.5, 0), ((5, 90), 2, 64), ((40, 30), 6, 128), ((3, 2), 16, 64), ((64, 64), 1, 64)])
def test_ten_sizes_with_a_network(student, size, scale, tile):
    result = upscale(picture(*size), student, scale=scale, tile=tile)
    assert result.size == tuple(round(side * scale) for side in size)
    assert np.isfinite(np.asarray(result, float)).all()


def test_a_tensor_comes_back_as_a_tensor(student):
    image = picture(12, 9)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    result = upscale(tensor, student)
    assert result.shape == (3, 36, 48) and result.min() >= 0 and result.max() <= 1
    levels = (result * 255).round().byte().permute(1, 2, 0)
    assert np.array_equal(levels.numpy(), np.asarray(upscale(image, student)))


def test_threads_do_not_change_the_picture(student):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(np.asarray(upscale(picture(40, 30), student)))
    torch.set_num_threads(1)
    assert np.array_equal(*results)


def test_memory_that_runs_out_is_met_with_smaller_tiles(student, monkeypatch, capsys):
    seen, enough = [], 128

    def scarce(pictures, size, names, vosr, tile, batch, *options):
        seen.append(tile)
        if tile > enough:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return [Image.new("RGB", size)]

    monkeypatch.setattr(sample, "restore", scarce)
    assert upscale(picture(70, 70), student, name="a.png").size == (280, 280) and seen == [512, 140, 128]
    assert capsys.readouterr().err.count("a.png: out of memory") == 2
    enough = 0
    with pytest.raises(MemoryError):
        upscale(picture(70, 70), student)


def test_a_list_of_pictures_equals_single_pictures_bit_for_bit(student):
    clear = picture(40, 24, "RGBA", 4)
    images = [picture(40, 24), clear, clear.convert("L"), clear.rotate(180)]
    together = upscale(images, student, name=["a", "b", "c", "d"], scale=2)
    for image, name, result in zip(images, "abcd", together, strict=True):
        alone = upscale(image, student, name=name, scale=2)
        assert result.mode == alone.mode and np.array_equal(result, alone)
    with pytest.raises(ValueError, match="one size, and a name each"):
        upscale([images[0], picture(8, 8)], student, name=["a", "b"])


@pytest.mark.parametrize("color", ["wavelet", "adain"])
def test_pictures_that_share_a_pass_of_the_networks_come_out_the_same(student, teacher, color):
    """As on a GPU; sums over a batch may round in another order."""
    images, size, names = [picture(20, 12), picture(20, 12).rotate(180)], (80, 48), ["a", "b"]
    for vosr, steps, posterior in ((student, 1, "mode"), (teacher, 3, "mode"), (student, 2, "sample")):
        options = (vosr, 512, 4, steps, 42, 0.5, 0.1, color, 0.0, posterior, False)
        both = sample.restore(images, size, names, *options)
        for image, name, result in zip(images, names, both, strict=True):
            alone, = sample.restore([image], size, [name], *options)
            assert abs(np.asarray(result, int) - np.asarray(alone, int)).max() <= 1


@pytest.mark.parametrize("size, wanted", [((70, 50), (280, 200)), ((37, 90), (101, 333)), ((60,) * 2,) * 2])
def test_windows_of_the_enlarged_input_are_cut_from_the_whole(stub, monkeypatch, size, wanted):
    """Each tile enlarges its own part of the input; pixels are those of the picture enlarged as a whole."""
    seen, image = [], picture(*size)
    monkeypatch.setattr(stub.vae, "encode", lambda x, noise=None: seen.append(x) or Stub.encode(None, x))
    upscale(image, stub, size=wanted, tile=64, color="none")
    whole = np.asarray(image.resize(wanted, Image.Resampling.BICUBIC), int)
    rows, cols = (-(-side // 16) * 16 - side for side in wanted[::-1])
    whole = np.pad(whole, ((0, rows), (0, cols), (0, 0)), mode="reflect")
    places = itertools.product(*(tile_layout(n // 8, 32, 16) for n in whole.shape[:2]))
    windows = [np.rint((x[0].permute(1, 2, 0).numpy() + 1) * 127.5).astype(int) for x in seen]
    for (top, left), window in zip(places, windows, strict=True):
        cut = whole[8 * top:8 * top + window.shape[0], 8 * left:8 * left + window.shape[1]]
        assert abs(window - cut).max() <= 1 and (window != cut).mean() < 0.001


def test_tiles_get_smaller_when_little_memory_is_free(student, monkeypatch, capsys):
    seen, restore = [], sample.restore
    monkeypatch.setattr(sample, "restore", lambda p, s, n, v, tile, *rest: seen.append(tile) or restore(
        p, s, n, v, tile, *rest))
    for free in (1e9, 70e6, 1e6):
        monkeypatch.setattr(sample, "free_memory", lambda device, free=free: free)
        upscale(picture(130, 130), student, name="a.png")
    assert seen == [512, 264, 128]
    assert capsys.readouterr().err.count("little memory is free, --tile") == 2


def test_one_failing_picture_of_a_group_spoils_no_other(weights, tmp_path, monkeypatch, capsys):
    """As on a GPU, where pictures of one size go together: here the third of four cannot be written."""
    for name in "abcd":
        picture(8, 8).save(tmp_path / f"{name}.png")
    real = sample.data.write_image
    monkeypatch.setattr(sample.data, "write_image", lambda path, *rest: real(
        path if path.stem[0] != "c" else tmp_path / "no" / "c.png", *rest))
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    words = ["sample.py", f"--weights={weights}", "--device=cpu", str(tmp_path)]
    monkeypatch.setattr(sample.sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        sample.main()
    assert stop.value.code == 1 and "1 of 4 failed" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("*_x4.png")) == ["a_x4.png", "b_x4.png", "d_x4.png"]


def test_an_output_that_no_memory_holds_is_refused_before_the_work(student, tmp_path, monkeypatch):
    picture(8, 8).save(tmp_path / "a.png")
    monkeypatch.setattr(sample, "free_memory", lambda device: 1e9)
    cfg = sample.Config(size="20000x20000")
    with pytest.raises(ValueError, match="20000x20000 take 3 GB, 1 are free"):
        sample.opened(tmp_path / "a.png", tmp_path / "b.png", cfg)


def test_infinite_latents_are_noticed(student, monkeypatch):
    monkeypatch.setattr(VOSR, "velocity", lambda self, z, *rest: z + float("inf"))
    with pytest.raises(FloatingPointError):
        upscale(picture(10, 10), student)


def test_wrong_arguments_of_the_library_are_named(student):
    for image, options in ((torch.zeros(4, 8, 8), {}), (torch.zeros(8, 8), {}), (torch.zeros(1, 3, 8, 8), {}),
                           (torch.zeros(3, 8, 8, dtype=torch.uint8), {}),
                           (picture(8, 8), dict(color="blue"))):
        with pytest.raises(ValueError, match=r"\(3, H, W\)"):
            upscale(image, student, **options)


def steps_at(image, borders):
    """Mean step between neighbours across each border: between columns, and between rows."""
    levels = np.asarray(image.convert("L"), float)
    return np.array([(abs(levels[:, b] - levels[:, b - 1]).mean(), abs(levels[b] - levels[b - 1]).mean())
                     for b in borders])


@pytest.mark.slow
@pytest.mark.parametrize("model, closeness", [("tiny", 45), ("0.5B-os", 25)])
def test_tiles_of_a_1024_px_picture_leave_no_seam_and_change_little(published, model, closeness):
    """Against the untiled picture: `closeness` in dB, and steps at tile borders are no higher."""
    leaves = dead_leaves(keyed_generator("cpu", "seam"), 256).permute(1, 2, 0).numpy()
    vosr = load(model, 1, ROOT / "weights" if model == "tiny" else published, device="cpu")
    whole, tiled = (upscale(Image.fromarray(leaves), vosr, tile=tile) for tile in (0, 512))
    error = (np.asarray(whole, float) - np.asarray(tiled, float)) ** 2
    assert 10 * math.log10(255**2 / error.mean()) > closeness
    starts = {*tile_layout(128, 64, 8), *tile_layout(128, 64, 16)}
    borders = [8 * (start + end) for start in starts for end in (0, 6, 10, 64) if 0 < start + end < 128]
    assert (steps_at(tiled, borders) / steps_at(whole, borders)).max() < 1.1


def test_group_norms_with_the_statistics_of_the_whole_equal_the_untiled_pass():
    vae, image = AutoencoderKL((8, 8, 8, 8), norm_num_groups=4), random(1, 3, 64, 96)
    whole = vae.encode(image)
    with shared_norms(vae, lambda: vae.encode(image)):
        assert torch.allclose(vae.encode(image), whole, atol=1e-5)
        part = vae.encode(image[..., :64])
    assert not torch.allclose(part, vae.encode(image[..., :64]), atol=1e-3)  # its own statistics
    assert torch.equal(vae.encode(image), whole)                              # as before
