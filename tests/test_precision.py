"""What tools/precision.py measures: 16-bit products with known answers, stream, modes, frozen networks."""
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model
import tools.precision as tool
import train
from config import launch
from data import keyed_generator
from model import ModelConfig, QwenVAE
from tools.precision import MODES, GPUProducts, half_velocity, psnr, random_dit, random_inputs, scale_stream

ROOT = Path(__file__).parent.parent
SHAPE = ModelConfig(dim=64, depth=4, num_heads=2, enc_dim=32, resolution=64, ae_type="sd2")


def small(stream=((slice(None), 126.0),)):
    """A scaled network, its inputs, its velocity in fp32 and the maxima of its stream."""
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    net = random_dit(SHAPE, generator, device)
    inputs = random_inputs(net, 64, generator, device)
    with torch.no_grad():
        return net, inputs, *scale_stream(net, inputs, stream)


def product(a, b, dtype):
    """Sum of a_i b_i through a linear layer under autocast."""
    with GPUProducts(), torch.autocast("cpu", dtype):
        return F.linear(torch.tensor([a]), torch.tensor([b])).item()


def test_operands_are_rounded_before_the_product():
    """1 + 2^-9 is no bf16 number, but an fp16 one: bf16 keeps 7 bits behind the point, fp16 10."""
    assert product([1 + 2**-9], [1.0], torch.bfloat16) == 1
    assert product([1 + 2**-9], [1.0], torch.float16) == 1 + 2**-9


def test_sums_are_rounded_once_at_the_end():
    """In bf16 1 + 2^-9 is 1 again however often it is added; in float32 four of them make 1 + 2^-7."""
    assert product([1.0, 2**-9], [1.0, 1.0], torch.bfloat16) == 1
    assert product([1.0] + 4 * [2**-9], 5 * [1.0], torch.bfloat16) == 1 + 2**-7


def test_a_result_beyond_the_range_of_fp16_is_infinite():
    assert product([35_000.0], [2.0], torch.float16) == math.inf
    assert product([35_000.0], [2.0], torch.bfloat16) == 70_144                # 137 * 2^9


def test_attention_rounds_its_weights_but_not_their_sum():
    """Scores 0 and -0.1: the weights 1 and 0.9047 become 1 and 232/256, their sum stays 1.9047."""
    q, k, v = (torch.tensor(x).view(1, 1, -1, 1).bfloat16() for x in ([1.0], [0.0, -0.1], [0.0, 1.0]))
    with GPUProducts():
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.item() == round(232 / 256 / 1.904749 * 512) / 512 == 244 / 512


def test_a_convolution_is_rounded_before_and_after_its_bias_is_added():
    """1 + 0.75/128 becomes 1 + 1/128, and does so again less 0.375/128; the exact sum is nearer to 1."""
    x, weight, bias = torch.tensor([1.0, 0.75 / 128]), torch.ones(1, 2, 1, 1), torch.tensor([-0.375 / 128])
    with GPUProducts(), torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x.view(1, 2, 1, 1), weight, bias).item() == 1 + 1 / 128
        assert F.conv2d(x.view(1, 2, 1, 1), weight).item() == 1 + 1 / 128


def test_a_group_norm_of_16_bits_stays_in_float32():
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with GPUProducts(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.group_norm(x, 2), F.group_norm(x.float(), 2))


class Spy(TorchDispatchMode):
    """Dtypes of the operands of all products."""
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("mm", "conv", "attention", "linear", "softmax")):
            self.seen.update(a.dtype for a in args if torch.is_tensor(a))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_no_16_bit_product_escapes_the_emulation(mode):
    net, inputs, *_ = small()
    with torch.no_grad(), Spy() as spy:
        half_velocity(net, inputs, *MODES[mode])
    assert spy.seen == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_auto_keeps_the_residual_stream_in_fp32_and_everything_does_not(mode):
    net, inputs, *_ = small()
    stream = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, __, x: stream.append(x.dtype))
    with torch.no_grad():
        half_velocity(net, inputs, *MODES[mode])
    dtype, everything = MODES[mode]
    assert stream == SHAPE.depth * [dtype if everything else torch.float32]
    assert all(p.dtype == torch.float32 for p in net.parameters())              # it worked on a copy


def test_the_stream_reaches_the_wanted_magnitude_in_all_or_in_a_few_channels():
    few = ((slice(3), 126.0), (slice(3, None), 16.0))
    for targets in (((slice(None), 126.0),), few):
        net, inputs, v, found = small(targets)
        last = []
        for block in net.blocks:
            block.register_forward_hook(lambda _, __, x, last=last: last.append(x))
        with torch.no_grad():
            assert torch.equal(net(*inputs), v) and v.std() > 0.1
        for value, (rows, wanted) in zip(found, targets, strict=True):
            assert value == torch.cat(last)[..., rows].abs().max() == pytest.approx(wanted, rel=0.05)


def test_auto_is_more_precise_than_everything_and_fp16_than_bf16():
    net, inputs, exact, _ = small()
    with torch.no_grad():
        values = {mode: psnr(half_velocity(net, inputs, *how), exact)[0] for mode, how in MODES.items()}
    for half in ("fp16", "bf16"):
        assert values[f"auto {half}"] > values[f"{half} everything"] + 1
    for how in ("auto {}", "{} everything"):                                    # 3 bits are 18 dB
        assert values[how.format("fp16")] - values[how.format("bf16")] == pytest.approx(18, abs=4)


def test_no_part_of_the_random_network_is_zero_and_the_gain_is_that_of_queries_and_keys_only():
    one, two = (dict(random_dit(SHAPE, torch.Generator().manual_seed(0), "cpu", gain).named_parameters())
                for gain in (1.0, 2.0))
    for name, p in one.items():
        assert p.abs().max() > 0
        assert torch.equal(two[name], 2 * p if "q_norm" in name or "k_norm" in name else p)


def test_psnr_on_paper():
    v = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert psnr(v, v)[0] == math.inf
    value, error = psnr(v * 1.01, v)                                            # std(v) is sqrt(4/3)
    assert error == pytest.approx(0.01 * math.sqrt(3 / 4), rel=1e-4)
    assert value == pytest.approx(20 * math.log10(4 / error), rel=1e-4)


def test_the_same_seed_gives_the_same_table_and_another_one_does_not(capsys):
    def lines(seed):
        tool.table(tool.Config(models="tiny", size=32, seed=seed), torch.device("cpu"))
        return capsys.readouterr().out.splitlines()

    first = lines(1)
    assert [line.split(" | ")[2] for line in first[2:]] == list(MODES)
    assert first == lines(1) != lines(2)


@pytest.mark.parametrize("words, reason", [
    (["--models", "2B"], "unknown model '2B', choose of: tiny"), (["--size", "20"], "--size 20"),
    (["--models=tiny", "--channels=192"], "tiny has 192"), (["--training", "--data=x"], "x does not exist"),
    (["--models=tiny", "--size=32", "--stream=0"], "stays at")])
def test_a_wrong_call_is_explained_in_one_line(words, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--device=cpu", *words])
    with pytest.raises(SystemExit, match="2"):
        launch(tool.main)
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


# ---------------------------------------------------------------- --training
FROZEN = {"AutoencoderKL": partial(model.AutoencoderKL, (32, 32), 1),
          "QwenVAE": lambda *_: QwenVAE([0.0] * 16, [1.0] * 16, 8),
          "DINOv2": partial(model.DINOv2, 28, 2, 1, img_size=56, size=56, layer=1)}
SETTINGS = dict(dim=32, depth=1, num_heads=1, enc_dim=8, ae_type="tiny", resolution=32, cache=4,
                train_batch_size=2, max_train_steps=3, log_every=1, device="cpu")
TRAINING = train.Config(**SETTINGS)


def trained(encode):
    return tool.trainings(TRAINING, encode, torch.device("cpu"))


def in_half():
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_both_computes_in_fp32_and_in_bf16():
    """1 + 2^-9 is no bf16 number."""
    one = torch.ones(1, 1, 1, 1)
    assert tool.both(lambda x: F.conv2d(x, one), one + 2**-9).flatten().tolist() == [1 + 2**-9, 1]


@pytest.mark.parametrize("name", FROZEN)
def test_no_16_bit_product_of_a_frozen_network_escapes_the_emulation(name):
    net = FROZEN[name]()
    with Spy() as spy:
        exact, half = tool.both(getattr(net, "encode", net), torch.linspace(-1, 1, 3072).view(1, 3, 32, 32))
    assert spy.seen == {torch.float32} and not torch.equal(exact, half)


def test_errors_of_frozen_networks_are_relative_to_the_deviation_within_channels(monkeypatch, capsys):
    """tiny: bf16 is 1.01 times fp32, on channels with means that are no part of the deviation."""
    class Tiny(torch.nn.Module):
        def encode(self, x):
            return x.sign() * (1.01 if in_half() else 1) + 100 * torch.arange(3).view(3, 1, 1)

    for name, make in FROZEN.items():
        monkeypatch.setattr(model, name, make)
    tool.frozen_table(0, Tiny(), *torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert " ".join(row[0] for row in rows) == "tiny tiny SD2.1 SD2.1 DINOv2-B Qwen Qwen"
    assert " ".join(row[1] for row in rows) == "z0 c_str z0 c_str c_sem z0 c_str"
    assert rows[0][2:] == rows[1][2:] == ["52.0", "1.0e-02", "1.0e-02", "+1.0e-02"]
    for _, _, db, rms, largest, _ in rows[2:]:
        assert 1e-3 < float(rms) < 0.1 and float(largest) > float(rms)
        assert float(db) == pytest.approx(20 * math.log10(4 / float(rms)), abs=0.5)


def test_the_two_trainings_share_their_draws_and_differ_in_their_latents():
    """Untrained, the network returns 0: the loss is that of noise - z0, where z0 is 0.5 or, in bf16, 1."""
    def encode(images):
        return images.new_full((len(images), 16, 4, 4), 1.0 if in_half() else 0.5)

    losses, _ = trained(encode)
    for run, (seed, z0) in enumerate(((42, 0.5), (42, 1.0), (43, 0.5))):
        draws = train.draw(TRAINING, torch.zeros(2, 16, 4, 4), keyed_generator("cpu", seed, 0, 0, 0))
        wanted = (draws["noise"] - z0).square().mean().item()
        assert losses[run, 0].item() == pytest.approx(wanted, rel=1e-5)


def test_trainings_on_the_same_latents_are_the_same_but_for_other_draws():
    losses, tests = trained(lambda x: F.avg_pool2d(x, 8).repeat(1, 6, 1, 1)[:, :16])
    assert torch.equal(losses[0], losses[1]) and tests[0] == tests[1]
    assert (losses[2] != losses[0]).all() and tests[2] != tests[0]


def test_the_fp32_row_is_what_train_py_logs_and_bf16_moves_it_less_than_other_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [f"--{name}={value}" for name, value in SETTINGS.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", f"--out={tmp_path}", *words])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    train.main()
    logged = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses, _ = trained(train.frozen(TRAINING, torch.device("cpu")).encode)
    assert losses[0].tolist() == pytest.approx(logged, rel=1e-5)
    _, half, other = (losses - losses[0]).abs().mean(1)
    assert 0 < half < 0.1 * other
