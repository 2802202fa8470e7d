"""tools/degradation.py: the plain operations do what data.py does, distributions are accepted and refused."""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import data
import tools.degradation as tool
from config import launch
from tools.degradation import describe, judge

ROOT = Path(__file__).parent.parent
OFFICIAL = ROOT.parent / "shared" / "fixtures" / "degradation_distributions.json"
BLUE, RED, WHITE = (70, 130, 180), (255, 0, 0), (255, 255, 255)
needs_official = pytest.mark.skipif(not OFFICIAL.is_file(), reason="the official distributions are not here")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The tool as a command, in an empty folder -> its exit code."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()  # which bench changes

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["degradation.py", *map(str, words)])
        try:
            launch(tool.main)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    yield call
    torch.set_num_threads(threads)


def picture(*shape, seed=0):
    """Smooth random pictures (B, 3, H, W) in [0, 1]."""
    coarse = torch.rand(shape[0], 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=shape[-2:], mode="bilinear")


def field(shape):
    """Stands in for randn: one field for all samples and channels, as the shapes asked for differ."""
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randn(1, 1, *shape[-2:], generator=generator).expand(shape)


def counts(rate):
    """Stands in for poisson: nothing is rounded, so there are no ties."""
    return 0.9 * rate + 0.5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind, _ in data.FIRST["kernels"]])
def test_plain_blur_is_blur(kind, batch):
    x, draw = picture(batch, 3, 33, 40), dict(kind=kind, size=9, sigma_x=2.0, sigma_y=0.5, theta=1, beta=0.7)
    kernels = data.blur_kernel(**draw).expand(batch, -1, -1)
    assert torch.allclose(tool.plain_blur(x, **draw), data.blur(x, kernels), atol=2e-6)
    assert torch.allclose(tool.plain_blur(x), x, atol=1e-7)  # without a kernel it is the unit pulse


@pytest.mark.parametrize("gray", [[False], [True], [True, False, True], [False] * 3], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_plain_noise_is_noise(kind, gray):
    x, strength = picture(len(gray), 3, 20, 24), torch.tensor([0.7])
    noisy = tool.plain_noise(x, dict(kind=kind, strength=0.7), gray, field, counts)
    for b, flag in enumerate(gray):
        one = x[b : b + 1]
        want = (data.gaussian_noise(one, strength, field((1, 3, 20, 24))) if kind == "gaussian" else
                data.poisson_noise(one, strength, counts, flag))
        assert torch.allclose(noisy[b : b + 1], want, atol=1e-6)


@pytest.mark.parametrize("quality", [[30.0], [72.3], [30.0, 49.9, 95.0]], ids=str)
def test_plain_jpeg_is_jpeg(quality):
    """Rounding ties aside: they move a block by a step of the table."""
    x = picture(len(quality), 3, 41, 52) * 1.2 - 0.1
    error = (tool.plain_jpeg(x, quality) - data.jpeg(x, torch.tensor(quality))).abs()
    assert (error > 2e-6).float().mean() < 0.01


@pytest.mark.parametrize("batch", [1, 3])
def test_the_plain_chain_is_the_degradation(batch):
    """On the same draws. A tie in Poisson noise or JPEG may spread: few chains differ, above 42 dB."""
    equal, fake = [], (field, counts)
    for seed in range(16):
        hr, k = picture(batch, 3, 80, 92, seed=seed), seed % batch
        draws = data.draw_batch(batch, 80, 92, data.keyed_generator("cpu", seed))
        alike = [draws[k] | {n: draws[k][n] | dict(gray=d[n]["gray"]) for n in ("noise1", "noise2")}
                 for d in draws]
        plain, ours = tool.plain_degrade(hr, draws, k, *fake), data.degrade_with(hr, alike, *fake)
        equal.append(((plain - ours).abs() * 255 > 0.5).float().mean() < 0.001)
        assert (plain - ours).square().mean() < 10**-4.2
    assert sum(equal) >= 14


def test_draws_are_described_under_the_names_of_the_reference():
    found = describe(dict(
        kernel1=dict(kind="generalized_iso", size=21, sigma_x=1.5, beta=1.0), jpeg1=50.0, jpeg2_early=70.0,
        noise1=dict(kind="poisson", strength=2.0, gray=True), resize1=dict(mode="area", scale_factor=0.5),
        noise2=dict(kind="gaussian", strength=3.0, gray=False), resize_lr=dict(mode="area", size=(9, 9)),
        resize2=dict(mode="bicubic", size=(9, 9), factor=1.0), sinc=dict(kind="sinc", size=7, cutoff=2.0)))
    assert found.pop("kernel1_rms_radius") == pytest.approx(1.5, abs=1e-4)
    assert found.pop("kernel1_centre_weight") == pytest.approx(1 / (2 * math.pi * 1.5**2), abs=1e-5)
    assert found == dict(
        kernel1_kind="generalized_iso", kernel1_size="21", kernel1_sigma_x=1.5, kernel1_beta_generalized=1.0,
        resize1_mode="area", resize1_factor=0.5, resize1_kind="down", resize2_mode="bicubic",
        resize2_factor=1.0, resize2_kind="keep", resize_lr_mode="area", noise1_kind="poisson",
        noise1_gray="1", noise1_poisson_scale=2.0, noise2_kind="gaussian", noise2_gray="0", noise2_sigma=3.0,
        jpeg1_quality=50.0, jpeg2_quality=70.0, second_blur="0", final_sinc="1", final_sinc_size="7",
        final_sinc_cutoff=2.0, order="jpeg_sinc")


def test_standard_errors_on_paper():
    """60 of 100 where half were expected: the standard error is 5 of 100, and sqrt(2) that against 100."""
    many = 10**12
    for runs, error in ((many, 2), (100, 2**0.5)):
        row = judge("x", ["a"] * 60 + ["b"] * 40, dict(n=runs, fraction=dict(a=0.5, b=0.5)))
        assert row[3] == pytest.approx(error)
    assert judge("x", ["a", "c"], dict(n=many, fraction=dict(a=1.0)))[3] > tool.LIMIT  # c never occurs
    uniform = dict(n=many, q05_25_50_75_95=[0.05, 0.25, 0.5, 0.75, 0.95])
    assert judge("x", list((np.arange(100) + 0.5) / 100), uniform)[3] < 1e-6
    far = 0.25 / (0.25 * 0.75 / 100) ** 0.5  # none below 0.25, all below 0.75
    assert judge("x", [0.3] * 75 + [0.6] * 25, uniform)[3] == pytest.approx(far)


def test_where_many_values_are_equal_the_quantile_may_be_any_of_them():
    want = dict(n=10**12, q05_25_50_75_95=[0.0, 1.0, 1.0, 1.0, 2.0])
    assert judge("x", [0.0] * 10 + [1.0] * 80 + [2.0] * 10, want)[3] == 0
    assert judge("x", [0.0] * 40 + [1.0] * 50 + [2.0] * 10, want)[:3] == ("< 1", 0.4, 0.25)


def test_median_sharpness_is_compared_for_each_way_of_enlarging():
    """All shares fit, the median of 0 and 9 does not: 4.5 instead of 1, where 2.5 % sqrt(2) is the error."""
    own, want = [0.0, 9.0] * 50, dict(n=100, q05_25_50_75_95=[0.0, 0.0, 1.0, 9.0, 9.0])
    assert judge("sharpness_ratio", own, want)[3] == 0
    what, ours, theirs, error = judge("sharpness_ratio_when_back_area", own, want)
    assert (what, ours, theirs) == ("median", 4.5, 1.0) and error == pytest.approx(3.5 / 0.025 / 2**0.5)


def test_effects_on_pictures_are_measured(monkeypatch):
    """A tenth brighter: 20 dB, 25.5 levels, as sharp as before. Only the first pictures are degraded."""
    monkeypatch.setattr(data, "degrade", lambda hr, generator: hr + 0.1)
    own = tool.collect(tool.Config(draws=5, pictures=3), picture(2, 3, 40, 40) * 0.8)
    assert len(own["jpeg1_quality"]) == 5 and len(own["psnr"]) == 3
    for name, value in (("psnr", 20), ("mean_level_shift_255", 25.5), ("sharpness_ratio", 1)):
        assert own[name] == pytest.approx([value] * 3, rel=1e-3)
    assert sum(len(own.get(f"sharpness_ratio_when_back_{mode}", [])) for mode in data.FIRST["modes"]) == 3


def paper(**changes):
    """What Real-ESRGAN's settings say, as a reference of 5,000 runs."""
    steps = [0.05, 0.25, 0.5, 0.75, 0.95]
    ranges = dict(jpeg1_quality=(30, 95), noise1_sigma=(1, 30), kernel2_sigma_x=(0.2, 1.5)) | changes
    values = {name: dict(n=5000, q05_25_50_75_95=[low + (high - low) * p for p in steps])
              for name, (low, high) in ranges.items()}
    kinds = dict(Gaussian_iso=0.405, Gaussian_aniso=0.225, generalized_Gaussian_iso=0.108, plateau_iso=0.108,
                 generalized_Gaussian_aniso=0.027, plateau_aniso=0.027, sinc=0.1)
    shares = dict(kernel1_kind=kinds, resize2_kind=dict(up=0.3, down=0.4, keep=0.3))
    values |= {name: dict(n=5000, fraction=fraction) for name, fraction in shares.items()}
    return json.dumps(dict(values=values | dict(psnr=dict(n=5000, q05_25_50_75_95=[16, 18, 19, 21, 23]))))


def outside(capsys):
    """Names of the values that stats reported as too different."""
    return {line.split()[0] for line in capsys.readouterr().out.splitlines() if "OUTSIDE" in line}


def test_draws_agree_with_the_settings_on_paper_and_what_differs_is_named(run, tmp_path, capsys):
    (tmp_path / "good.json").write_text(paper())
    assert run("stats", "--draws=800", "--reference", "good.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and "5 values compared, 0 more" in lines[-2] and "--images" in lines[-1]
    (tmp_path / "other.json").write_text(paper(jpeg1_quality=(40, 95)))
    assert run("stats", "--draws=800", "--reference", "other.json", "--seed=1") == 1
    assert outside(capsys) == {"jpeg1_quality"}


@needs_official
def test_official_distributions_are_met_and_a_factor_ten_percent_too_small_is_not(run, monkeypatch, capsys):
    assert run(*(words := ("stats", "--draws=3000", "--reference", OFFICIAL))) == 0
    smaller = tuple(((0.9 * low, 0.9 * high), share) for (low, high), share in data.FIRST["resize"])
    stages = data.FIRST | dict(resize=smaller), data.SECOND
    monkeypatch.setitem(data.DEGRADATIONS, "full", data.DEGRADATIONS["full"] | dict(stages=stages))
    assert run(*words) == 1
    assert outside(capsys) == {"resize1_factor", "resize1_kind"}


@pytest.mark.slow
@needs_official
def test_degraded_pictures_have_the_official_sharpness_and_psnr(run, capsys):
    images = OFFICIAL.with_name("degradation_images.safetensors")
    assert run("stats", "--reference", OFFICIAL, "--images", images) == 0
    assert "50 values compared, 0 more than 4" in capsys.readouterr().out


def test_the_sheet_shows_our_draws_in_blue_and_the_reference_in_red(run, tmp_path):
    (tmp_path / "reference.json").write_text(paper())
    save_file({"images": (picture(2, 3, 40, 40) * 255).byte()}, tmp_path / "images.safetensors")
    sheets = []
    for words in ((), ("--reference=reference.json",), ("--images=images.safetensors",)):
        assert run("stats", "--draws=40", "-o", "sheet.png", *words) in (0, 1)
        sheets.append(Image.open("sheet.png").convert("RGB"))
    colours = [dict(map(reversed, sheet.getcolors(2**20))) for sheet in sheets]
    assert min(found[BLUE] for found in colours) > 0.05 * sheets[0].width * sheets[0].height
    assert [found.get(RED, 0) > 100 for found in colours] == [False, True, False]
    tool.draw_panel(sheets[0], 0, 0, "title", ["b"] * 9, dict(fraction=dict(a=1.0)))
    assert [sheets[0].getpixel(at) for at in ((60, 50), (60, 24), (180, 50))] == [WHITE, RED, BLUE]


def test_bench_prints_a_row_per_size_and_batch(run, monkeypatch, capsys):
    """By a clock on which ours takes 2 seconds per image and the plain operations 6."""
    def timed(work, pace):
        return lambda hr, *args: now.append(now[-1] + pace * len(work(hr, *args)))

    now = [0.0]
    monkeypatch.setattr(data, "degrade", timed(data.degrade, 2))
    monkeypatch.setattr(tool, "plain_degrade", timed(tool.plain_degrade, 6))
    monkeypatch.setattr(tool.time, "process_time", lambda: now[-1])
    assert run("bench", "--sizes=80,96", "--batches=1,2", "--samples=2") == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[4:]]
    assert [[float(cell) for cell in row] for row in rows] == [
        [size, batch, 6000, 2000, 3, 3, 0.5, 2 // batch, 0] for size in (80, 96) for batch in (1, 2)]


@pytest.mark.gpu
def test_bench_on_a_gpu_measures_ours_alone(run, capsys):
    assert run("bench", "--device=cuda", "--sizes=128", "--batches=4", "--samples=8") == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]
    assert row[2].strip() == "nan" and float(row[3]) > 0 and int(row[-1]) > 0


@pytest.mark.parametrize("words, reason", [
    ([], "usage: "), (["stats", "bench"], "usage: "), (["stats", "--draws=0"], "--draws"),
    (["stats", "--reference=nowhere.json"], "nowhere.json"), (["stats", "--images=empty"], "SafetensorError"),
    (["stats", "--draws=2", "--out=nowhere/x.png"], "nowhere/x.png"), (["bench", "--sizes=64"], "at 74"),
    (["bench", "--sizes=large"], "'large'"), (["bench", "--device=tpu"], "--device tpu is not there")])
def test_a_wrong_call_ends_with_one_line_and_code_2(words, reason, run, tmp_path, capsys):
    (tmp_path / "empty").write_bytes(b"")
    assert run(*words) == 2
    out, error = capsys.readouterr()
    assert not out and reason in error and error.startswith("error: ") and error.count("\n") == 1
