"""What tools/precision.py measures: 16-bit products with known answers, the stream, the order of modes."""
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tools.precision as tool
from config import launch
from model import ModelConfig
from tools.precision import MODES, GPUProducts, half_velocity, psnr, random_dit, random_inputs, scale_stream

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


@pytest.mark.parametrize("mode", MODES)
def test_no_16_bit_product_escapes_the_emulation(mode):
    seen = set()

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(word in str(func) for word in ("mm", "conv", "attention", "linear", "softmax")):
                seen.update(a.dtype for a in args if torch.is_tensor(a))
            return func(*args, **(kwargs or {}))

    net, inputs, *_ = small()
    with torch.no_grad(), Spy():
        half_velocity(net, inputs, *MODES[mode])
    assert seen == {torch.float32}


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
    (["--models=tiny", "--channels=192"], "tiny has 192"),
    (["--models=tiny", "--size=32", "--stream=0"], "stays at")])
def test_a_wrong_call_is_explained_in_one_line(words, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--device=cpu", *words])
    with pytest.raises(SystemExit, match="2"):
        launch(tool.main)
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
