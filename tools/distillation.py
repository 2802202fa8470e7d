"""How much rounding the correction of rc_loss magnifies, and what a step of distill.py costs.

    python tools/distillation.py noise --data photos/     # a minute of a CPU core
    python tools/distillation.py cost                     # three minutes of a CPU core

noise: c_l u - c_r moved - v_g of Eq. 14, before the clip, of samples with t - r > delta, against the same
networks and draws in float64; of the bundled pair on pictures, and of random networks as wide as 0.5B. On a
CPU the 16-bit products of a GPU are emulated. cost: FLOPs (2 per multiply-add) are counted on meta tensors.
"""
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import train
from config import cli, die, launch
from data import keyed_generator
from model import DiT, choose_device, load_dit, per_sample
from tools.precision import GPUProducts, random_dit

PAIRS = {name: distill.Config(**shape | dict(auxiliary_time_cond=True, corner=0.0))  # t and r as published
         for name, shape in distill.DISTILL.items()}
BF16, FP16, OURS, FINE = torch.bfloat16, torch.float16, "bf16 autocast (ours)", "fp16 autocast"
MODES = {  # name: dtype, way (see parts_of)
    "bf16, everything cast": (BF16, "cast"), "bf16 autocast of all layers (official)": (BF16, "all"),
    "bf16 autocast, but for the time": (BF16, "ends"), OURS: (BF16, ""), FINE: (FP16, ""),
    "fp32": (torch.float32, "")}
LAYERS = {"ends": ("x_embedder", "final_layer.linear")}
LAYERS["all"] = *LAYERS["ends"], "t_embedder", "r_embedder", "t_block", "final_layer.adaLN_modulation"
MIXED = {  # name: what is taken from FINE, all else from OURS
    "ours, rollout fp16": ["rollout"], "ours, rollout and sg(u) fp16, one more pass": ["rollout", "u_pred"]}


@dataclass
class Config:
    data: str = "procedural"  # noise: pictures for the bundled pair, as in train.py
    weights: str = "weights"  # noise: folder that holds the bundled pair in tiny/
    delta: float = 0.01  # Delta t of Eq. 13; the noise goes with 1 / delta
    depth: int = 2  # noise: blocks of the random networks
    batch: int = 16  # pictures, or random latents
    rounds: int = 9  # cost: how often a step is timed, twice each
    seed: int = 42  # of weights and draws
    device: str = "auto"  # cuda, mps, cpu in that order
    inputs: tuple = ()  # the word noise or cost


def row(*cells, head=False):
    print(f"| {' | '.join(map(str, cells))} |", *["|" + "---|" * len(cells)] * head, sep="\n", flush=True)


def plain_loss(method, student, teacher, z0, c_str, c_sem, t, r, noise, partial, strength, struct_noise,
               alpha, omega=0.5, delta=0.01, rollout=2):
    """rc_loss or shortcut_loss in six passes that share nothing, in the dtype of z0. Arguments as there;
    strength and alpha (B,). Returns (loss, intermediates of the same names)."""
    def at(x):
        return per_sample(x).to(z0.dtype)                                       # (B, 1, 1, 1)

    def f(z, t, r):
        return student(z, t, *kappa, r=r).to(z0.dtype)
    z_t, weak, empty = (1 - at(t)) * z0 + at(t) * noise, at(alpha) * c_str, torch.zeros_like(c_sem)
    noisy = at(strength) * c_str + at((1 - strength**2) ** 0.5) * struct_noise
    kappa = torch.where(per_sample(partial), weak, noisy), torch.where(partial.view(-1, 1, 1), 0, c_sem)
    with torch.no_grad():
        v_cond, v_pcond = (teacher(z_t, t, *c).to(z0.dtype) for c in ((noisy, c_sem), (weak, empty)))
        v_guided = v_pcond + omega * (v_cond - v_pcond)                         # Eq. 5
    v_loss, u = F.mse_loss(f(z_t, t, t), v_guided), f(z_t, t, r)                # Eq. 6
    parts = dict(u_pred=u, v_guided=v_guided)
    with torch.no_grad():
        if method == "shortcut":                                                # Eq. 7-9
            t_mid = (t + r) / 2
            first = f(z_t, t, t_mid)
            target = (first + f(z_t - at(t - t_mid) * first, t_mid, r)) / 2
        else:                                                                   # Eq. 13-15
            t_m = torch.maximum(t - delta, r)
            z, moved = z_t - at(t - t_m) * v_guided, torch.zeros_like(z_t)
            for i in range(rollout):
                a, b = (t_m * (1 - j / rollout) + r * (j / rollout) for j in (i, i + 1))
                step = at(a - b) * f(z, a, b)
                z, moved = z - step, moved + step
            near, distance = t < r + delta + 1e-6, (t - r).clamp(min=1e-6)
            parts |= dict(rollout=moved, c_l=torch.where(near, 1.0, distance / delta),
                          c_r=torch.where(near, 1 / distance, 1 / delta))
            target = u - unclipped(parts).clamp(-1, 1)
    return v_loss + F.mse_loss(u, target), parts                                # Eq. 11 and 17


def unclipped(parts):
    """The correction of Eq. 14 before the clip, (B, C, h, w) in the dtype of its parts."""
    c_l, c_r = (per_sample(parts[name]).to(parts["u_pred"].dtype) for name in ("c_l", "c_r"))
    return c_l * parts["u_pred"] - c_r * parts["rollout"] - parts["v_guided"]


METHODS = {"rc": distill.rc_loss, "shortcut": distill.shortcut_loss}
LOSSES = METHODS | {f"plain {name}": partial(plain_loss, name) for name in METHODS}


def given(run, z0, c_str, c_sem, cfg):
    """Arguments of a loss after its networks; random draws as in a run of distill.py."""
    drawn = distill.draw(run, z0, keyed_generator(z0.device, cfg.seed))
    return dict(z0=z0, c_str=c_str, c_sem=c_sem, omega=run.omega, delta=cfg.delta) | drawn


def random_pair(run, px, cfg, device):
    """(student, teacher), alike but for the embedder of r; Gaussian inputs, a semantic token per 32 px."""
    generator = torch.Generator().manual_seed(cfg.seed)
    student = random_dit(run, generator, device, gain=2.0)                      # see there for the gain
    teacher = random_dit(replace(run, auxiliary_time_cond=False), generator, device)
    teacher.load_state_dict({name: student.state_dict()[name] for name in teacher.state_dict()})
    latent, tokens = (student.channels, px // 8, px // 8), ((px // 32) ** 2, run.enc_dim)
    inputs = (torch.randn(cfg.batch, *s, generator=generator).to(device) for s in (latent, latent, tokens))
    return (student, teacher), given(run, *inputs, cfg)


@torch.no_grad()
def tiny_pair(cfg, device):
    """The bundled (student, teacher), inputs from pictures."""
    run = replace(PAIRS["tiny"], data=cfg.data, weights=cfg.weights, seed=cfg.seed)
    vosr = distill.load_around(run, device, Path(cfg.weights, "tiny", "ms"), student=False)
    hr, lr = train.preview_pairs(run, device, numbers=range(cfg.batch))
    inputs = given(run, *vosr.encode(torch.cat([hr, lr])).float().chunk(2), vosr.semantic_tokens(lr), cfg)
    return (load_dit(Path(cfg.weights, "tiny", "os")).to(device), vosr.dit), inputs


# ---------------------------------------------------------------- noise
@torch.no_grad()
def parts_of(nets, inputs, dtype, way=""):
    """Intermediates of rc_loss under autocast to dtype; way "ends": of first and last layer, too; "all": of
    the time embedding, too; "cast": of plain_loss, all in dtype, but for the times where it is half."""
    nets, device, half = deepcopy(nets), inputs["z0"].device.type, dtype.itemsize == 2
    for name, part in (pair for net in nets for pair in net.named_modules()):
        if name in LAYERS.get(way, ()):
            part.forward = torch.autocast(device, dtype)(part.forward)
    with GPUProducts() if device == "cpu" and half else nullcontext():
        if way != "cast":
            with torch.autocast(device, dtype if half else BF16, enabled=half):
                return distill.rc_loss(*nets, **inputs)[1]
        cast = {name: x.to(dtype) for name, x in inputs.items() if torch.is_tensor(x)
                and x.is_floating_point() and not (half and name in "tr")}      # a rounded time is another
        with patch.object(torch.Tensor, "float", torch.Tensor.float if half else torch.Tensor.double):
            return plain_loss("rc", *(net.to(dtype) for net in nets), **inputs | cast)[1]


def noises(nets, inputs):
    """Of far samples, {mode: [noise, that of the quietest and of the loudest, noise after the clip, cosine to
    the exact correction there, which is what u is pulled along]}; and that correction, (n, C, h, w)."""
    far, found = inputs["t"] - inputs["r"] > inputs["delta"] + 1e-5, {}
    exact = unclipped(parts_of(nets, inputs, torch.float64, "cast"))[far]
    parts = {mode: parts_of(nets, inputs, *how) for mode, how in MODES.items()}
    for mode in (*MODES, *MIXED):
        better = {name: parts[FINE][name] for name in MIXED.get(mode, ())}
        corr = unclipped(parts.get(mode, parts[OURS]) | better).double()[far]
        each, a, b = (corr - exact).flatten(1).std(1), corr.clamp(-1, 1), exact.clamp(-1, 1)
        found[mode] = [x.item() for x in ((corr - exact).std(), each.min(), each.max(), (a - b).std(),
                                          F.cosine_similarity(a.flatten(), b.flatten(), 0))]
    return found, exact


def noise(cfg, device):
    large = random_pair(replace(PAIRS["0.5B"], depth=cfg.depth), 128, cfg, device)
    row("networks", "precision", "noise", "of a sample", "after the clip", "cosine", head=True)
    for name, pair in (("tiny", tiny_pair(cfg, device)), (f"0.5B, {cfg.depth} random blocks", large)):
        found, exact = noises(*pair)
        for mode, (whole, least, most, after, cosine) in found.items():
            row(name, mode, f"{whole:.2g}", f"{least:.2g} to {most:.2g}", f"{after:.2g}", f"{cosine:.4f}")
        row(name, "the correction itself", f"{exact.std():.2g}", "", f"{exact.clamp(-1, 1).std():.2g}", "")
    print(f"\nStandard deviations; delta {cfg.delta:g}, {len(exact)} of {cfg.batch} samples, seed {cfg.seed}")


# ---------------------------------------------------------------- cost
def counted(run, px, device="meta"):
    """{step: (calls of a DiT, FLOPs)} per image: a forward, and forward and backward, plain and ours."""
    if run.depth > 2:                                                           # each more adds the same
        one, two = (counted(replace(run, depth=n), px, device) for n in (1, 2))
        return {name: (n, x + (run.depth - 2) * (x - one[name][1])) for name, (n, x) in two.items()}
    found = {}
    with torch.device(device), sdpa_kernel(SDPBackend.MATH):                    # attention as two products
        student, teacher = DiT(run), DiT(replace(run, auxiliary_time_cond=False)).requires_grad_(False)
        z0 = torch.empty(1, student.channels, px // 8, px // 8)
        c_sem = torch.empty(1, (run.dinov2_size // 14) ** 2, run.enc_dim)
        drawn = distill.draw(run, z0, None)
        steps = {name: partial(f, student, teacher, z0, z0, c_sem, **drawn) for name, f in LOSSES.items()}
        for name, step in (steps | {"forward": partial(teacher, z0, drawn["t"], z0, c_sem)}).items():
            with (FlopCounterMode(display=False) as flops,
                  patch.object(DiT, "forward", autospec=True, side_effect=DiT.forward) as forward):
                out = step()
                if name in LOSSES:
                    out[0].backward()
            found[name] = forward.call_count, flops.get_total_flops()
    return found


def spread(values, digits=2):
    return "{} ({} to {})".format(*(f"{values.quantile(q):.{digits}f}" for q in (0.5, 0.25, 0.75)))


def cost(cfg, device):
    print("A step per image: calls of the networks, TFLOP, and the same in forward passes.\n")
    row("size", "px", "forward", "plain", *METHODS, "plain / rc", "plain / shortcut", head=True)
    for name, px in (("0.5B", 256), ("0.5B", 512), ("1.4B", 256), ("1.4B", 512)):
        found = counted(PAIRS[name], px)
        (_, one), steps = found["forward"], [found[step] for step in ("plain rc", *METHODS)]
        row(name, px, f"{one / 1e12:.3f}", *(f"{n}, {x / 1e12:.2f}, {x / one:.2f}" for n, x in steps),
            *(f"{steps[0][1] / x:.2f}" for _, x in steps[1:]))
    nets, inputs = random_pair(PAIRS["tiny"], PAIRS["tiny"].resolution, cfg, device)
    nets[0].requires_grad_(True)

    def clock():                                    # ms; on a CPU of this process, which others disturb less
        if device.type == "cpu":
            return 1e3 * time.process_time()
        torch.accelerator.synchronize()
        return 1e3 * time.perf_counter()

    def step(loss):
        start = clock()
        with torch.autocast(device.type, BF16, enabled=device.type == "cuda"):
            value = loss(*nets, **inputs)[0]
        value.backward()
        return clock() - start
    print(f"\ntiny, forward and backward of {cfg.batch} images, {device}, {torch.get_num_threads()} threads; "
          f"{'CPU time; ' * (device.type == 'cpu')}medians and middle halves of {cfg.rounds} rounds.\n")
    row("step", "plain, ms", "ours, ms", "plain / ours", "the same one twice", head=True)
    for name, ours in METHODS.items():
        order = (LOSSES[f"plain {name}"], ours, ours, LOSSES[f"plain {name}"])  # drift hits both
        a, b, c, d = torch.tensor([[step(f) for f in order] for _ in range(2 + cfg.rounds)][2:]).T
        row(name, spread(torch.cat([a, d]), 0), spread(torch.cat([b, c]), 0), spread((a + d) / (b + c)),
            spread(torch.cat([a / d, b / c])))


def main():
    cfg = cli(Config)
    if cfg.inputs not in (("noise",), ("cost",)) or min(cfg.depth, cfg.batch, cfg.rounds, cfg.delta) <= 0:
        die("say noise or cost; --depth, --batch, --rounds and --delta are positive")
    torch.backends.cudnn.allow_tf32 = False                                     # fp32 means fp32
    {"noise": noise, "cost": cost}[cfg.inputs[0]](cfg, choose_device(cfg.device))


if __name__ == "__main__":
    launch(main)
