"""How far half precision is from fp32: one pass of a full-size DiT with random weights, as a markdown table.

    python tools/precision.py                              # 0.5B and 1.4B, on a GPU where there is one
    python tools/precision.py --models 0.5B --gain 1       # plain Gaussian weights, far less sensitive
    python tools/precision.py --models tiny                # seconds: what the table looks like

"auto" is what sample.py does, "everything" what ports do that cast the whole network. One of them publishes
for 2.0, which has the size of 1.4B: stream up to about 126, fp16 everything 49.3 dB, bf16 everything 37.6 dB.
The residual branches are scaled to that stream; it matters little, as rounding is relative. How sharp the
attention is matters: gain 2 for queries and keys was chosen because bf16 everything then comes near the
published number, 35 to 40 dB over seeds; plain weights give 48 to 50. On a CPU the 16-bit results of a GPU
are emulated; 1.4B takes 12 GB of memory and 3 minutes.
"""
import math
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import cli, launch
from model import GRID, DiT, choose_device, halve, read_config
from train import PRESETS

MODES = {  # name: dtype, whether everything is cast
    "auto fp16": (torch.float16, False),
    "auto bf16": (torch.bfloat16, False),
    "fp16 everything": (torch.float16, True),
    "bf16 everything": (torch.bfloat16, True),
}


@dataclass
class Config:
    models: str = "0.5B,1.4B"  # presets of train.py, separated by commas; 2.0 has the size of 1.4B
    size: int = 256  # side of the picture in pixels, a multiple of 16
    stream: float = 126.0  # largest value of the residual stream after any block
    channels: int = 0  # how many channels reach it while the others stay at an eighth; 0: all are alike
    gain: float = 2.0  # mean gain of normed queries and keys; attention scores deviate by its square
    seed: int = 42  # of weights and inputs
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them that is there


# ---------------------------------------------------------------- 16-bit products of a GPU, on a CPU
def flash_attention(q, k, v, half):
    """softmax(q k^T / sqrt(d)) v in float32, but for what a fused kernel rounds: the unnormalised weights."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])                                        # (B, H, T, N)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.to(half).float() @ v / weights.sum(-1, keepdim=True)


aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default, ATTENTION}


class GPUProducts(TorchDispatchMode):
    """16-bit products as a GPU makes them: exact products of the operands, float32 sums, one rounding.

    What a CPU does depends on its model. Elementwise operations and norms are alike on both: computed in
    float32, then rounded. The mode sees operands after autocast, which casts the same products on both.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        half = getattr(args[0], "dtype", None) if args else None
        if func not in PRODUCTS or half not in (torch.float16, torch.bfloat16):
            return func(*args, **(kwargs or {}))
        args = [a.float() if torch.is_tensor(a) else a for a in args]
        if func == ATTENTION:
            return flash_attention(*args[:3], half).to(half), None                    # None: for a backward
        return func(*args, **(kwargs or {})).to(half)


# ---------------------------------------------------------------- network, inputs, passes
def random_dit(cfg, generator, device, gain=1.0):
    """DiT without a zero part: weights of variance 1 / fan-in; gains around 1, biases around 0, both +- 0.1.

    gain: factor on the gains of queries and keys.
    """
    with torch.device("meta"):
        net = DiT(cfg)
    net = net.to_empty(device="cpu").eval().requires_grad_(False)
    for name, p in net.named_parameters():
        mean = float(p.ndim == 1 and name.endswith("weight"))
        p.normal_(mean, p[0].numel() ** -0.5 if p.ndim > 1 else 0.1, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            p *= gain
    return net.to(device)


def random_inputs(net, size, generator, device):
    """z_t, t, c_str, c_sem as DiT.forward takes them: unit variance, t = 1."""
    latent, tokens = (1, net.channels, size // 8, size // 8), (1, 1024, net.cfg.enc_dim)
    z_t, c_str, c_sem = (torch.randn(s, generator=generator).to(device) for s in (latent, latent, tokens))
    return z_t, torch.ones(1, device=device), c_str, c_sem


def scale_stream(net, inputs, targets, passes=8):
    """Scale the residual branches until the stream has the wanted maxima; -> v, the maxima.

    targets: pairs (slice of channels, largest |x| after any block). The branches see x only normed, so the
    stream is about proportional to the factor. Raises ValueError where `passes` do not come within 5 %.
    """
    top = []
    hooks = [block.register_forward_hook(lambda _, __, x: top.append(x.abs().amax((0, 1))))
             for block in net.blocks]
    try:
        for _ in range(passes):
            top.clear()
            v = net(*inputs)
            found = [torch.stack(top)[:, rows].max().item() for rows, _ in targets]
            if all(abs(a - wanted) < 0.05 * wanted for a, (_, wanted) in zip(found, targets, strict=True)):
                return v, found
            for value, (rows, wanted) in zip(found, targets, strict=True):
                for block in net.blocks:
                    for last in (block.attn.proj, block.cross_attn.proj, block.mlp.w3):
                        last.weight[rows] *= wanted / value
                        last.bias[rows] *= wanted / value
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(f"the residual stream stays at {found}, wanted {[w for _, w in targets]}")


def half_velocity(net, inputs, dtype, everything):
    """v in float32, from a copy of net in half precision."""
    net, device = deepcopy(net), inputs[0].device.type
    if everything:
        net, inputs = net.to(dtype), [x.to(dtype) for x in inputs]
    else:
        halve(net, dtype)
    with (GPUProducts() if device == "cpu" else nullcontext(),
          torch.autocast(device, dtype, enabled=not everything)):
        return net(*inputs).float()


def psnr(v, exact):
    """dB against a picture of deviation a quarter of its range, relative error; nan or -inf: overflow."""
    error = (v - exact).square().mean().sqrt() / exact.std()
    return (20 * torch.log10(4 / error)).item(), error.item()


@torch.no_grad()
def table(cfg, device):
    """Print a line per model and mode. Raises ValueError for a wrong model, size or number of channels."""
    models = cfg.models.split(",")
    if unknown := [name for name in models if name not in PRESETS]:
        raise ValueError(f"unknown model {unknown[0]!r}, choose of: {', '.join(PRESETS)}")
    if cfg.size < 1 or cfg.size % GRID:
        raise ValueError(f"--size {cfg.size} is not a multiple of {GRID}")
    print("| model | stream | mode | PSNR, dB | relative error |\n|---|---|---|---|---|", flush=True)
    targets = [(slice(cfg.channels or None), cfg.stream)]
    if cfg.channels:
        targets.append((slice(cfg.channels, None), cfg.stream / 8))
    for name in models:
        generator = torch.Generator().manual_seed(cfg.seed)
        net = random_dit(read_config(PRESETS[name], name), generator, device, cfg.gain)
        if not 0 <= cfg.channels < net.cfg.dim:
            raise ValueError(f"--channels {cfg.channels}: {name} has {net.cfg.dim}, some must stay small")
        inputs = random_inputs(net, cfg.size, generator, device)
        exact, found = scale_stream(net, inputs, targets)
        stream = ", rest ".join(f"{value:.0f}" for value in found)
        for mode, (dtype, everything) in MODES.items():
            value, error = psnr(half_velocity(net, inputs, dtype, everything), exact)
            print(f"| {name} | {stream} | {mode} | {value:.1f} | {error:.1e} |", flush=True)


def main():
    cfg = cli(Config)
    device = choose_device(cfg.device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also in the convolution
    table(cfg, device)
    how = {"cpu": "emulated on a CPU"}.get(device.type, f"run on {device.type}")
    print(f"\n{cfg.size} px, random weights, queries and keys of gain {cfg.gain:g}, seed {cfg.seed}, {how}.\n"
          "PSNR = 20 log10(4 std(v) / rms error): the velocity of a random network is no picture, so its\n"
          "error is put against a picture whose standard deviation is a quarter of its range.")


if __name__ == "__main__":
    launch(main)
