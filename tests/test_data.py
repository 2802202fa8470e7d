"""Image files, degradation and sources on cases with known answers; the fixtures run in test_parity.py."""
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data


def picture(*shape, seed=0):
    """Smooth random pictures (B, 3, H, W) in [0, 1]."""
    coarse = torch.rand(shape[0], 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=shape[-2:], mode="bilinear")


def save(path, size=(20, 16), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_a_written_image_is_read_again_and_halves_are_rounded_up(tmp_path):
    image = torch.tensor([0.0, 0.5 / 255, 1.49 / 255, 2.5 / 255, 1.0, -3.0]).expand(3, 2, 6)
    data.write_image(tmp_path / "é x.png", image)
    assert (data.read_image(tmp_path / "é x.png") * 255)[0, 0].round().tolist() == [0, 1, 1, 3, 255, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["é x.png"]


def test_orientation_alpha_grey_and_sixteen_bits_are_understood(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # turned by 90 degrees
    Image.new("RGB", (30, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").shape == (3, 30, 20)
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (data.read_image(tmp_path / "clear.png") == 1).all()
    Image.fromarray(np.full((2, 2), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert torch.allclose(data.read_image(tmp_path / "deep.png"), torch.tensor(156 / 255))
    Image.new("L", (2, 2), 51).save(tmp_path / "grey.png")
    assert torch.equal(data.read_image(tmp_path / "grey.png"), torch.full((3, 2, 2), 0.2))
    assert data.open_source(tmp_path).image(1)[:, 0, 0].tolist() == [156, 156, 156]  # deep.png, 40000 / 257


@pytest.mark.parametrize("content", [b"", b"just text", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_not_an_image_is_named_in_one_line(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png is not an image that can be read; PNG, JPEG"):
        data.read_image(tmp_path / "x.png")


def test_the_same_key_gives_the_same_numbers_and_another_key_others():
    a, b, c = (torch.rand(4, generator=data.keyed_generator("cpu", 1, name)) for name in "xxy")
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("k", [7, 21])  # direct and by FFT
def test_blur_is_a_correlation_that_reflects_at_the_edge(k):
    """A single weight right of the centre fetches the right neighbour; past the edge, the last but one."""
    image, kernel = picture(2, 3, 30, 31), torch.zeros(2, k, k)
    kernel[:, k // 2, k // 2 + 1] = 1
    wanted = torch.cat([image[..., 1:], image[..., -2:-1]], dim=-1)
    assert torch.allclose(data.blur(image, kernel), wanted, atol=1e-6)


def test_kernels_sum_to_one_and_the_gaussian_is_the_formula():
    r = torch.arange(11) - 5.0
    kernel = torch.exp(-(r**2 + r[:, None] ** 2) / (2 * 1.5**2))
    assert torch.allclose(data.blur_kernel("iso", 11, 1.5), kernel / kernel.sum(), atol=1e-7)
    for draw in data.draw_batch(300, 64, 64, data.keyed_generator("cpu", 0)):
        for name in draw.keys() & {"kernel1", "kernel2", "sinc"}:
            assert abs(data.blur_kernel(**draw[name]).sum() - 1) < 1e-5


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_a_batch_is_resized_as_pytorch_resizes_each_sample(mode):
    image, draws = picture(5, 3, 40, 33), [dict(scale_factor=f, mode=mode) for f in (0.17, 0.5, 1.005, 1.43)]
    resized, sizes = data.resize(image, [*draws, dict(size=(7, 50), mode=mode)])
    for b, draw in enumerate(draws):
        alone = F.interpolate(image[b : b + 1], scale_factor=draw["scale_factor"], mode=mode)
        assert sizes[b] == tuple(alone.shape[-2:])
        assert torch.allclose(resized[b, :, : sizes[b][0], : sizes[b][1]], alone[0], atol=2e-6)
    alone = F.interpolate(image[4:], size=(7, 50), mode=mode)
    assert torch.allclose(resized[4, :, :7, :50], alone[0], atol=2e-6)


def test_jpeg_rounds_the_mean_of_a_flat_block_to_multiples_of_the_table():
    """At quality 50 the first step is 16, the first coefficient 8 (Y - 128): 130 stays, 129 is a tie."""
    levels = torch.tensor([130.0, 129, 131]).view(3, 1, 1, 1).expand(3, 3, 16, 16) / 255
    levels = data.jpeg(levels, torch.full((3,), 50.0)) * 255
    assert torch.allclose(levels[:, :, 3, 3], torch.tensor([[130.0], [128], [132]]), atol=0.01)


def test_noise_has_the_stated_strength_and_poisson_noise_spares_black():
    image, noise = torch.full((2, 3, 4, 4), 0.5), torch.ones(2, 1, 4, 4)
    noisy = data.gaussian_noise(image, torch.tensor([10.0, 200.0]), noise)
    assert torch.allclose(noisy[:, 0, 0, 0], torch.tensor([0.5 + 10 / 255, 1.0]))
    image = torch.tensor([0.0, 0.0, 0.2, 1.0]).expand(1, 3, 4, 4)  # three values: v = 4
    wanted = torch.tensor([0, 0, 0.2 + 0.5 * (1 / 4 - 0.2), 1 + 0.5 * (1 / 4 - 1)])
    for gray in (False, True):
        noisy = data.poisson_noise(image, torch.tensor([0.5]), lambda rate: (rate > 0).float(), gray)
        assert torch.allclose(noisy, wanted.expand(1, 3, 4, 4), atol=1e-4)  # luma's weights sum to 0.9999


def test_samples_of_different_sizes_in_one_batch_come_out_as_alone():
    """Without randomness: rounding ties aside, one level at most, a batch equals its samples one by one."""
    hr, generator = picture(16, 3, 72, 60), data.keyed_generator("cpu", 3)
    draws = data.draw_batch(16, 72, 60, generator, "full+mild")

    def silent(x):
        return x if torch.is_tensor(x) else torch.zeros(x)

    together = data.degrade_with(hr, draws, silent, silent)
    alone = torch.cat([data.degrade_with(hr[b : b + 1], [draws[b]], silent, silent) for b in range(16)])
    assert len({tuple(d["resize1"].items()) for d in draws}) > 8
    assert ((together - alone).abs() * 255 > 0.5).float().mean() < 0.001


def test_degradation_depends_on_the_generator_alone_and_has_eight_bits():
    hr = picture(1, 3, 64, 48).expand(4, -1, -1, -1)
    one, same, other = (data.degrade(hr, data.keyed_generator("cpu", seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal((one * 255).round() / 255, one) and one.min() >= 0 and one.max() <= 1
    assert not torch.equal(one[0], one[1])  # every sample has its own draws


@pytest.mark.parametrize("kind", ["full", "mild", "full+mild"])
@pytest.mark.parametrize("size", [(8, 8), (9, 30), (45, 64)])
def test_small_and_oblong_pictures_can_be_degraded(kind, size):
    hr = picture(6, 3, *size)
    assert data.degrade(hr, data.keyed_generator("cpu", 0), kind).shape == hr.shape
    lr = data.degrade(hr, data.keyed_generator("cpu", 0), kind, enlarged=False)
    assert lr.shape == (6, 3, size[0] // 4, size[1] // 4) and lr.isfinite().all()


def test_wrong_degradations_are_refused():
    for size, kind, reason in ((64, "strong", "'strong'; full, mild exist"), (5, "full", "5 x 64 px is")):
        with pytest.raises(ValueError, match=reason):
            data.degrade(picture(1, 3, size, 64), data.keyed_generator("cpu", 0), kind)


def test_mild_is_milder_than_full():
    hr = picture(12, 3, 64, 64)
    full, mild = ((data.degrade(hr, data.keyed_generator("cpu", 0), kind) - hr).square().mean()
                  for kind in ("full", "mild"))
    assert mild < full / 2


def test_draws_have_the_shares_and_ranges_of_real_esrgan():
    """Shares within five standard errors of 2,000 draws."""
    draws = data.draw_batch(2000, 96, 96, data.keyed_generator("cpu", 0))
    factors = [d["resize1"]["scale_factor"] for d in draws]
    assert 0.15 <= min(factors) < 0.17 and 1.48 < max(factors) <= 1.5
    shares = [(0.7, [f < 1 for f in factors]), (0.1, [f == 1 for f in factors])]
    shares += [(0.8, ["kernel2" in d for d in draws]), (0.8, ["sinc" in d for d in draws])]
    shares += [(0.1, [d["kernel1"]["kind"] == "sinc" for d in draws])]
    shares += [(0.4, [d["noise2"]["gray"] for d in draws]), (0.5, ["jpeg2_late" in d for d in draws])]
    for share, hits in shares:
        assert abs(sum(hits) / 2000 - share) < 5 * math.sqrt(share * (1 - share) / 2000)


def test_folders_and_lists_are_sorted_and_hidden_files_ignored(tmp_path):
    for name in ("b.PNG", "a/c.jpg", "a/._c.jpg", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name) if name != "notes.txt" else (tmp_path / name).write_text("a/c.jpg\n\nb.PNG\n")
    wanted = [str(tmp_path / "a" / "c.jpg"), str(tmp_path / "b.PNG")]
    assert data.open_source(tmp_path).names == data.open_source(tmp_path / "notes.txt").names == wanted
    assert "2 pictures, smallest side 16 px" in data.describe(data.open_source(tmp_path))


def test_sources_that_do_not_work_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar").write_bytes(b"")
    save(tmp_path / "x.png")
    for name, reason in (("empty", "holds no pictures"), ("x.tar", "holds no pictures"),
                         ("x.png", "is not a text file"), ("missing", "does not exist")):
        with pytest.raises(ValueError, match=reason):
            data.open_source(tmp_path / name)


def test_crops_are_a_function_of_seed_and_index_and_an_epoch_shows_every_picture(tmp_path):
    whole = {save(tmp_path / f"{n}.png", (16, 16), n).numpy().tobytes() for n in range(7)}
    source = data.open_source(tmp_path)
    for epoch in (0, 7):
        assert {data.Crops(source, 16, 0)[epoch + n][0].numpy().tobytes() for n in range(7)} == whole
    crops = [data.Crops(source, 8, 0)[n][0] for n in range(9)]
    again = [data.Crops(data.open_source(tmp_path), 8, 0)[n][0] for n in reversed(range(9))]
    assert all(torch.equal(a, b) for a, b in zip(crops, reversed(again), strict=True))
    assert crops[0].shape == (3, 8, 8) and crops[0].dtype == torch.uint8


def test_unreadable_and_small_pictures_are_replaced_and_counted(tmp_path, capsys):
    for n in range(6):
        save(tmp_path / f"{n}.png", seed=n)
    save(tmp_path / "small.png", (7, 40))
    (tmp_path / "broken.png").write_bytes(b"text")
    source = data.open_source(tmp_path)
    assert all(data.Crops(source, 12, 0)[n][0].shape == (3, 12, 12) for n in range(24))
    assert len(source.small) == len(source.bad) == 1
    assert capsys.readouterr().out.count("unreadable: ") == 1
    with pytest.raises(ValueError, match="7 pictures are smaller than 99 px, 1 cannot be read, none is left"):
        data.Crops(source, 99, 0)[0]


def test_too_many_unreadable_pictures_stop_the_run(tmp_path):
    save(tmp_path / "a.png")
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(b"text")
    source = data.open_source(tmp_path)
    with pytest.raises(ValueError, match="2 of 4 cannot be read"):
        for n in range(8):
            data.Crops(source, 8, 0)[n]


def test_procedural_pictures_follow_the_key_and_have_the_spectrum_of_photographs():
    """Power falls by 2 to 2.8 octaves per octave of frequency: amplitude about 1 / f."""
    source, window = data.open_source("procedural"), torch.hann_window(128)
    crops = torch.stack([data.Crops(source, 128, 0)[n][0] for n in range(24)])
    assert torch.equal(crops[3], data.Crops(source, 128, 0)[3][0]) and not torch.equal(crops[3], crops[4])
    grey = crops.float().mean(dim=1)
    grey = grey - grey.mean(dim=(1, 2), keepdim=True)
    power = torch.fft.fft2(grey * window * window[:, None]).abs().square()
    f = torch.hypot(torch.fft.fftfreq(128)[:, None], torch.fft.fftfreq(128)[None])
    bands = torch.stack([power[:, (f >= low) & (f < 2 * low)].mean(dim=1).log2().mean()
                         for low in (0.03, 0.06, 0.12, 0.24)])
    assert ((bands.diff() < -1.8) & (bands.diff() > -3.2)).all()


def test_draws_per_batch_share_all_but_strength_and_colour_of_noise_and_quality():
    official, ours = (data.draw_batch(40, 64, 64, data.keyed_generator("cpu", 0), per_batch=flag)
                      for flag in (True, False))
    for name in official[0]:
        values = {str(draw[name]) for draw in official}
        assert len(values) == (40 if name.startswith(("noise", "jpeg")) else 1)
    assert len({str(draw["kernel1"]) for draw in ours}) == 40
    assert len({draw["noise1"]["kind"] for draw in official}) == 1
    assert len({draw["noise1"]["gray"] for draw in official}) == 2


def test_a_gpu_is_never_waited_for():
    """What reaches a device goes through `on`, and nothing comes back before the result."""
    source = Path(data.__file__).read_text()
    parts = (("def outside(", "def uniform_numbers("), ("def operate(", "@torch.no_grad()\ndef degrade("))
    for text in (source[source.index(first):source.index(end)] for first, end in parts):
        waits = r"\.(item|tolist|cpu|numpy|nonzero|unique|to)\(|torch\.tensor\(.*device"
        assert len(text) > 1000 and not [line for line in text.splitlines() if re.search(waits, line)
                                         and "bessel" not in line and "hypot" not in line]
