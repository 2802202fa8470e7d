"""How far half precision is from fp32: one pass of a full-size DiT with random weights, as a markdown table.

    python tools/precision.py                              # 0.5B and 1.4B, on a GPU where there is one
    python tools/precision.py --models 0.5B --gain 1       # plain Gaussian weights, far less sensitive
    python tools/precision.py --models tiny                # seconds: what the table looks like
    python tools/precision.py --training --data photos/    # the frozen networks of train.py instead

"auto" is what sample.py does, "everything" what ports do that cast the whole network. One of them publishes
for 2.0, which has the size of 1.4B: stream up to about 126, fp16 everything 49.3 dB, bf16 everything 37.6 dB.
The residual branches are scaled to that stream; it matters little, as rounding is relative. How sharp the
attention is matters: gain 2 for queries and keys was chosen because bf16 everything then comes near the
published number, 35 to 40 dB over seeds; plain weights give 48 to 50. On a CPU the 16-bit results of a GPU
are emulated; 1.4B takes 12 GB of memory and 3 minutes, --training 2 GB and 4 minutes of one core.
"""
import math
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import train
from config import cli, launch
from data import keyed_generator
from model import GRID, DiT, choose_device, halve, read_config
from tools.bench import fill

MODES = {  # name: dtype, whether everything is cast
    "auto fp16": (torch.float16, False), "auto bf16": (torch.bfloat16, False),
    "fp16 everything": (torch.float16, True), "bf16 everything": (torch.bfloat16, True)}
RUNS = {"fp32": (0, 0), "bf16 autocast": (1, 0), "fp32, other draws": (0, 1)}  # which of `both`, of the seeds


@dataclass
class Config:
    models: str = "0.5B,1.4B"  # presets of train.py, separated by commas; 2.0 has the size of 1.4B
    size: int = 256  # side of the picture in pixels, a multiple of 16
    stream: float = 126.0  # largest value of the residual stream after any block
    channels: int = 0  # how many channels reach it while the others stay at an eighth; 0: all are alike
    gain: float = 2.0  # mean gain of normed queries and keys; attention scores deviate by its square
    seed: int = 42  # of weights and inputs
    training: bool = False  # tables of the frozen networks of training, and of their effect
    data: str = "procedural"  # of --training: source of the crops, as in train.py
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them that is there


# ---------------------------------------------------------------- 16-bit products of a GPU, on a CPU
def flash_attention(q, k, v, half):
    """softmax(q k^T / sqrt(d)) v in float32, but for what a fused kernel rounds: the unnormalised weights."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])                                        # (B, H, T, N)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.to(half).float() @ v / weights.sum(-1, keepdim=True)


aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
CONVOLUTION, GROUP_NORM = aten.convolution.default, aten.native_group_norm.default
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, CONVOLUTION, ATTENTION, GROUP_NORM}


class GPUProducts(TorchDispatchMode):
    """16-bit products as a GPU makes them: exact products of the operands, float32 sums, one rounding.
    What a CPU does depends on its model. Elementwise operations and norms are alike on both: computed in
    float32, then rounded. The mode sees operands after autocast, which casts the same products on both. Only
    cuDNN rounds before it adds a bias, and the autocast of a GPU leaves group norms in float32."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        half = getattr(args[0], "dtype", None) if args else None
        if func not in PRODUCTS or half not in (torch.float16, torch.bfloat16):
            return func(*args, **(kwargs or {}))
        args = [a.float() if torch.is_tensor(a) else a for a in args]
        if func == ATTENTION:
            return flash_attention(*args[:3], half).to(half), None                    # None: for a backward
        if func == CONVOLUTION and args[2] is not None:
            return func(*args[:2], None, *args[3:]).to(half) + args[2].to(half).view(-1, 1, 1)
        out = func(*args, **(kwargs or {}))
        return out if func == GROUP_NORM else out.to(half)


# ---------------------------------------------------------------- network, inputs, passes
def random_dit(cfg, generator, device, gain=1.0):
    """DiT without a zero part: weights of variance 1 / fan-in; gains around 1, biases around 0, both +- 0.1.
    gain: factor on the gains of queries and keys."""
    net = model.build(lambda: DiT(cfg), cfg).to_empty(device="cpu").eval().requires_grad_(False)
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
    stream is about proportional to the factor. Raises ValueError where `passes` do not come within 5 %."""
    top = []
    hooks = [b.register_forward_hook(lambda _, __, x: top.append(x.abs().amax((0, 1)))) for b in net.blocks]
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


def as_on_gpu(dtype, function, *inputs, cast=True):
    """function(*inputs) in float32, computed as a GPU does; cast: under autocast to dtype."""
    device = inputs[0].device.type
    with (GPUProducts() if device == "cpu" else nullcontext(), torch.autocast(device, dtype, enabled=cast)):
        return function(*inputs).float()


def half_velocity(net, inputs, dtype, everything):
    """v in float32, from a copy of net in half precision."""
    net = deepcopy(net).to(dtype) if everything else halve(deepcopy(net), dtype)
    return as_on_gpu(dtype, net, *[x.to(dtype) if everything else x for x in inputs], cast=not everything)


def psnr(v, exact):
    """dB against a picture of deviation a quarter of its range, relative error; nan or -inf: overflow."""
    error = (v - exact).square().mean().sqrt() / exact.std()
    return (20 * torch.log10(4 / error)).item(), error.item()


@torch.no_grad()
def table(cfg, device):
    """Print a line per model and mode. Raises ValueError for a wrong model or number of channels."""
    models = cfg.models.split(",")
    if unknown := [name for name in models if name not in train.PRESETS]:
        raise ValueError(f"unknown model {unknown[0]!r}, choose of: {', '.join(train.PRESETS)}")
    print("| model | stream | mode | PSNR, dB | relative error |\n|---|---|---|---|---|", flush=True)
    rest = [(slice(cfg.channels, None), cfg.stream / 8)] if cfg.channels else []
    targets = [(slice(cfg.channels or None), cfg.stream), *rest]
    for name in models:
        generator = torch.Generator().manual_seed(cfg.seed)
        net = random_dit(read_config(train.PRESETS[name], name), generator, device, cfg.gain)
        if not 0 <= cfg.channels < net.cfg.dim:
            raise ValueError(f"--channels {cfg.channels}: {name} has {net.cfg.dim}, some must stay small")
        inputs = random_inputs(net, cfg.size, generator, device)
        exact, found = scale_stream(net, inputs, targets)
        stream = ", rest ".join(f"{value:.0f}" for value in found)
        for mode, (dtype, everything) in MODES.items():
            value, error = psnr(half_velocity(net, inputs, dtype, everything), exact)
            print(f"| {name} | {stream} | {mode} | {value:.1f} | {error:.1e} |", flush=True)


# ---------------------------------------------------------------- training: error of what is frozen, effect
@torch.no_grad()
def both(function, images):
    """(2, ...) float32: function(images) in fp32, and under bf16 autocast as train.py calls it on a GPU."""
    return torch.stack([function(images).float(), as_on_gpu(torch.bfloat16, function, images)])


def frozen_table(seed, tiny, hr, lr):
    """Print a line for each output of the frozen networks, all but `tiny` random; hr, lr (B, 3, H, W)."""
    torch.manual_seed(seed)                                                           # of the biases
    nets = {"tiny": tiny, "SD2.1": fill(model.AutoencoderKL(), seed), "DINOv2-B": fill(model.DINOv2(), seed),
            "Qwen": fill(model.QwenVAE(16 * [0.0], 16 * [1.0]), seed)}
    print("| frozen network | output | PSNR, dB | RMS error | largest | scale |\n|---|---|---|---|---|---|")
    for name, net in nets.items():
        for output, images in (("z0", hr), ("c_str", lr)) if hasattr(net, "encode") else [("c_sem", lr)]:
            pair = both(getattr(net.to(lr.device), "encode", net), images)
            exact, half = pair - pair[0].mean((0, 1) if output == "c_sem" else (0, 2, 3), keepdim=True)
            value, rms = psnr(half, exact)
            top, scale = (half - exact).abs().max() / exact.std(), half.std() / exact.std() - 1
            print(f"| {name} | {output} | {value:.1f} | {rms:.1e} | {top:.1e} | {scale:+.1e} |", flush=True)


def trainings(cfg, encode, device):
    """Train tiny as train.py does, once per row of RUNS, from the same weights and on the same crops.
    -> losses (runs, steps); and (runs) on half as many other crops, fp32 latents and draws alike for all."""
    def loss(net, z0, c_str, lr, *key):
        draws = train.draw(cfg, z0, keyed_generator(device, *key))
        return train.flow_loss(net, z0, c_str, net.semantic_encoder(lr), **draws)
    def prepare(hr, lr):
        return *both(encode, torch.cat([hr, lr])).flatten(0, 1).chunk(4), lr          # z0, c_str twice, lr

    torch.manual_seed(cfg.seed)                                                       # initial weights
    net = DiT(cfg)
    net.semantic_encoder = model.TinySemanticEncoder(cfg.enc_dim)
    nets, losses = torch.nn.ModuleList(deepcopy(net) for _ in RUNS).to(device), []
    opt = torch.optim.AdamW(nets.parameters(), betas=(0.9, cfg.adam_beta2), weight_decay=cfg.weight_decay)
    for step, (*latents, lr) in enumerate(train.batches(cfg, prepare, 0, 0, 1, device)):
        values = [loss(net, *latents[2 * half:][:2], lr, cfg.seed + other, step, 0, 0)
                  for net, (half, other) in zip(nets, RUNS.values(), strict=True)]
        sum(values).backward()                                                        # they share no weights
        for net in nets:
            torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad_norm)
        opt.param_groups[0]["lr"] = train.rate(cfg, step)
        opt.step()
        opt.zero_grad()
        losses.append([value.item() for value in values])
    z0, c_str, *_, lr = prepare(*train.preview_pairs(cfg, device, "", range(cfg.cache, 3 * cfg.cache // 2)))
    with torch.no_grad():
        return torch.tensor(losses).T, [loss(net, z0, c_str, lr, "test").item() for net in nets]


def training(cfg, device, how):
    """Print the errors of what train.py puts under bf16 autocast on a GPU, and what they do to tiny."""
    tiny = train.Config(**train.PRESETS["tiny"], data=cfg.data, seed=cfg.seed, max_train_steps=200,
                        train_batch_size=8, cache=128)
    frozen = train.frozen(tiny, device)
    frozen_table(cfg.seed, frozen, *train.preview_pairs(replace(tiny, resolution=cfg.size), device, "", [0]))
    losses, tests = trainings(tiny, frozen.encode, device)
    print("\n| latents | loss, last 50 | minus fp32 | absolute | test |\n|---|---|---|---|---|")
    for name, row, d, test in zip(RUNS, losses, losses - losses[0], tests, strict=True):
        print(f"| {name} | {row[-50:].mean():.4f} | {d.mean():+.4f} | {d.abs().mean():.4f} | {test:.4f} |")
    print(f"\nbf16 autocast {how}; above: a crop of {cfg.size} px, relative to the deviation within channels;"
          "\nbelow: tiny, 200 steps of 8 of 128 crops, DiT in fp32; differences by step, over all steps.")


def main():
    cfg = cli(Config)
    if cfg.size < 1 or cfg.size % GRID:
        raise ValueError(f"--size {cfg.size} is not a multiple of {GRID}")
    device = choose_device(cfg.device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also in the convolution
    how = {"cpu": "emulated on a CPU"}.get(device.type, f"run on {device.type}")
    if cfg.training:
        return training(cfg, device, how)
    table(cfg, device)
    print(f"\n{cfg.size} px, random weights, queries and keys of gain {cfg.gain:g}, seed {cfg.seed}, {how}.\n"
          "PSNR = 20 log10(4 std(v) / rms error): the velocity of a random network is no picture, so its\n"
          "error is put against a picture whose standard deviation is a quarter of its range.")


if __name__ == "__main__":
    launch(main)
