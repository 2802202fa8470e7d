"""What training costs: work, days and memory of every recipe, counted without a GPU; and how fast a step is.

    python tools/cost.py --mfu 0.35,0.5 --gpus 8              # counted, without weights or GPU; 3 minutes
    python tools/cost.py measure --preset tiny --steps 20     # really trains, timed by stage; large: on a GPU

FLOPs (2 per multiply-add) are of the project's modules on meta tensors. Memory is the peak of live fake
tensors, of the step as of the encodes under the CPU's bf16 autocast; no workspaces, fragments, degradation.
"""
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import model
import train
from config import cli, die, launch
from data import Crops, degrade, keyed_generator, open_source
from tools.bench import Watch, fill

PEAKS = {"A100": 312, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989}  # dense bf16 TFLOP/s
CARDS, SIZES = ("A100", "H200"), (24, 40, 80, 141)  # of the tables; GB
STAGES = ("data", "encode", "tokens", "forward", "backward", "optimizer")
STATE = 4 * 6  # bytes per parameter: weight, gradient, its bucket in DDP, two moments of AdamW, EMA
RECIPES = {name: train.Config(**row) for name, row in train.PRESETS.items() if name != "tiny"} | {  # Table 5
    f"{name} distillation": distill.Config(**row, auxiliary_time_cond=True)
    for name, row in distill.DISTILL.items() if name != "tiny"}


@dataclass
class Config:
    preset: str = "tiny"  # row of the presets of train.py that is measured
    steps: int = 20  # timed steps, after 3 to warm up
    batch: int = 8  # images of a measured step
    device: str = "auto"  # cuda, mps, cpu in that order
    compile: bool = False  # as in train.py
    recompute: bool = False  # as in train.py
    peak: float = 0.0  # TFLOP/s of the device, dense bf16; 0: by its name (A100, H100, H200)
    mfu: tuple = (0.35, 0.5)  # shares of the peak that the days assume
    gpus: int = 8  # cards that the days and --shard assume
    inputs: tuple = ()  # nothing, or the word measure


def frozen(cfg):
    """Autoencoder and semantic encoder that belong to a DiT, with initial values."""
    if cfg.ae_type == "tiny":
        return model.TinyAutoencoder(), model.TinySemanticEncoder(cfg.enc_dim)
    vae = model.AutoencoderKL() if cfg.ae_type == "sd2" else model.QwenVAE([0.0] * 16, [1.0] * 16)
    return vae, model.DINOv2(cfg.enc_dim, {768: 12, 1024: 24}[cfg.enc_dim], cfg.enc_dim // 64,
                       layer=cfg.layer_dinov2b_list[-1], size=cfg.dinov2_size)


def step_of(cfg, batch):
    """DiT, its teacher if any, and the loss of a step of train.py, or of distill.py, as a function."""
    net, teacher, side = model.DiT(cfg), torch.nn.Identity(), cfg.resolution // 8
    tokens = (cfg.resolution // 32) ** 2 if cfg.ae_type == "tiny" else (cfg.dinov2_size // 14) ** 2
    z0, c_sem = (torch.empty(batch, *shape) for shape in ((net.channels, side, side), (tokens, cfg.enc_dim)))
    if not cfg.auxiliary_time_cond:
        return net, teacher, lambda: train.flow_loss(net, z0, z0, c_sem, **train.draw(cfg, z0, None))
    teacher = model.DiT(replace(cfg, auxiliary_time_cond=False)).requires_grad_(False)
    return net, teacher, lambda: distill.rc_loss(net, teacher, z0, z0, c_sem, **distill.draw(cfg, z0, None),
                                                 omega=cfg.omega, delta=cfg.delta, rollout=cfg.rollout)[0]


def by_blocks(cfg, count):
    """Numbers of count(cfg) at full depth, from two shallow networks: every further block adds the same."""
    two, three = (count(replace(cfg, depth=n)) for n in (2, 3))
    return [a + (cfg.depth - 2) * (b - a) for a, b in zip(two, three, strict=True)]


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def work(cfg):
    """Parameters, also of two blocks and all around them; FLOPs per image of DiT, two encodes, tokens: ours,
    and official: nothing shared in distillation, encodes in TF32 (count twice), tokens by all of DINOv2."""
    def size(net):
        return sum(p.numel() for p in net.parameters())

    def dit(shallow):
        *nets, loss = step_of(shallow, 1)
        with patch.object(distill, "shared", lambda net, c_sem: c_sem):
            official = flops(lambda: loss().backward())
        return [*map(size, nets), flops(lambda: loss().backward()), official]
    with torch.device("meta"):
        (vae, semantic), image = frozen(cfg), torch.empty(2, 3, cfg.resolution, cfg.resolution)
        (own, teacher, *step), encode = by_blocks(cfg, dit), flops(lambda: vae.to("meta").encode(image))
        tokens, semantic.layer = flops(lambda: semantic(image[:1])), 99     # past the last block
        return dict(parameters=own, around=size(model.DiT(replace(cfg, depth=2))),
                    frozen=teacher + size(vae) + size(semantic), ours=[step[0], encode, tokens],
                    official=[step[1], 2 * encode, flops(lambda: semantic(image[:1]))])


class Live(TorchDispatchMode):
    """Peak of the bytes of all tensors that were made under it and are alive."""
    def __init__(self):
        super().__init__()
        self.live, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = () if func.is_view else out if isinstance(out, (tuple, list)) else [out]
        self.live |= {x.untyped_storage() for x in made if torch.is_tensor(x)}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live))
        return out


def held(function):
    """Bytes that function() makes and holds at most; norms in float32, as autocast has them on CUDA alone."""
    norms = {name: lambda x, *rest, norm=functional.__dict__[name], **more: norm(x.float(), *rest, **more)
             for name in ("group_norm", "layer_norm", "normalize")}
    with Live() as live, patch.multiple(functional, **norms):
        function()
    return live.peak


def memory(cfg):
    """Bytes per image of a micro-batch: forward and backward, these with --recompute, and the encodes."""
    autocast = torch.autocast("cpu", torch.bfloat16)

    def needs(batch):
        def step(shallow, recompute):
            net, _, loss = step_of(shallow, batch)
            net.recompute = recompute
            for p in net.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # it is in STATE
            return held(lambda: autocast(loss)().backward())
        vae, shape = frozen(cfg)[0].requires_grad_(False), (2 * batch, 3, cfg.resolution, cfg.resolution)
        return [*by_blocks(cfg, lambda shallow: [step(shallow, False), step(shallow, True)]),
                held(lambda: autocast(vae.encode)(torch.empty(shape)))]
    with FakeTensorMode(allow_non_fake_inputs=True):                    # beyond few images proportional
        per_image = [(many - few) // 8 for few, many in zip(needs(8), needs(16), strict=True)]
    model.rope_table.cache_clear()                                      # fake tables are not for others
    return per_image


def sharded(done, gpus):
    """Bytes of a GPU's state under --shard: slices (no bucket, that is DDP's), and whole, in float32, all
    outside the blocks and one block at a time, which is there twice: as it arrives and as tensors."""
    return (STATE - 4) * done["parameters"] / gpus + 4 * done["around"]


def micro_batch(gb, done, state, step, encode):
    """Images in gb * 1e9 bytes, beside bf16 copies of all weights: autocast keeps them for a forward pass."""
    free = 1e9 * gb - state - 4 * done["frozen"]
    return max(0, int(min((free - 2 * done["parameters"]) / step, free / encode)))


def table(title, head, lines):
    rows = (head, ["---"] * len(head), *lines)
    print(f"\n{title}\n", *(f"| {' | '.join(map(str, row))} |" for row in rows), sep="\n", flush=True)


def count(cfg):
    def summed(parts, unit, digits):
        return " + ".join(f"{n / unit:.{digits}f}" for n in parts) + f" = {sum(parts) / unit:.{digits}f}"
    done, lines = [(name, row, work(row)) for name, row in RECIPES.items()], []
    table("Work of an image, DiT + two encodes + tokens: TFLOP, counted, and ms at the peak of an A100 in\n"
          "bf16; official: nothing shared in distillation, encodes in TF32 (half the peak), all of DINOv2.",
          ("recipe", "px", "DiT", "frozen", "TFLOP", "ms, official", "ms, ours", "official / ours"),
          ([name, row.resolution, *(f"{w[part] / 1e6:.1f} M" for part in ("parameters", "frozen")),
            summed(w["ours"], 1e12, 3), *(summed(w[n], 1e9 * PEAKS["A100"], 1) for n in ("official", "ours")),
            f"{sum(w['official']) / sum(w['ours']):.2f}"] for name, row, w in done))
    table(f"Days on {cfg.gpus} GPUs: counted work at an assumed share of the peak (MFU), not a measurement.",
          ("recipe", "images", *(f"{card}, assumed {m:.0%}" for card in CARDS for m in cfg.mfu)),
          ([name, f"{n / 1e6:.1f} M",
            *(f"{n * sum(w['ours']) / (1e12 * PEAKS[card] * m * cfg.gpus * 86_400):.2g}"
              for card in CARDS for m in cfg.mfu)]
           for name, row, w in done for n in [row.max_train_steps * row.train_batch_size]))
    for name, row, w in done:
        (step, again, encode), state, slices = memory(row), STATE * w["parameters"], sharded(w, cfg.gpus)
        cells = ((state, slices), (4 * w["frozen"],), (2 * w["parameters"],), (step, again), (encode,))
        ways = ((state, step), (state, again), (slices, again))
        lines.append([name, *(" / ".join(f"{n / 1e9:.2f}" for n in cell) for cell in cells), *(" / ".join(
            str(micro_batch(gb - 2, w, *way, encode) or "-") for way in ways) for gb in SIZES)])
    table("Memory of a GPU in GB, counted; last columns: largest micro-batch, 2 GB assumed lost: plain /\n"
          f"with --recompute / with --recompute and --shard on {cfg.gpus} GPUs.",
          ("recipe", "state / sharded", "frozen", "bf16 weights", "step per image / recomputed",
           "encodes per image", *(f"{gb} GB" for gb in SIZES)), lines)


def measure(cfg):
    run, device = train.Config(**train.PRESETS[cfg.preset]), model.choose_device(cfg.device)
    if device.type != "cuda" and run.ae_type != "tiny":
        die(f"--preset {cfg.preset} is measured on a CUDA device, not on {device}; counting needs none")
    vosr, net = (fill(part, 0).to(device) for part in (model.VOSR(None, *frozen(run)), model.DiT(run)))
    ema, net.recompute = model.DiT(run).to(device), cfg.recompute
    for block in net.blocks if cfg.compile else ():
        block.compile()
    opt = torch.optim.AdamW(net.requires_grad_(True).parameters(), lr=run.learning_rate, fused=True)
    crops, watch = Crops(open_source("procedural"), run.resolution, run.seed), Watch(device)
    hr = torch.stack([crops[n][0] for n in range(cfg.batch)]).to(device) / 255
    for n in range(3 + cfg.steps):                                 # as train.run
        if n in (0, 3):
            watch.seconds, watch.peak = (dict.fromkeys((*STAGES, "rest"), 0.0) for _ in range(2))
        watch.switch("data")
        lr = degrade(hr, keyed_generator("cpu", n), run.degradation, per_batch=run.per_batch) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            watch.switch("encode")
            z0, c_str = vosr.encode(torch.cat([hr * 2 - 1, lr])).float().chunk(2)
            watch.switch("tokens")
            c_sem = vosr.semantic_tokens(lr)
            watch.switch("forward")
            loss = train.flow_loss(net, z0, c_str, c_sem, **train.draw(run, z0, keyed_generator(device, n)))
        watch.switch("backward")
        loss.backward()
        watch.switch("optimizer")
        torch.nn.utils.clip_grad_norm_(net.parameters(), run.max_grad_norm)
        opt.step()
        opt.zero_grad()
        train.update_ema(ema, net, run.ema_decay)
        watch.switch("rest")
    spent, done = {stage: watch.seconds[stage] / cfg.steps for stage in STAGES}, work(run)["ours"]
    done = dict(zip(("dit", "encode", "tokens", "step"), (*done, sum(done)), strict=True))
    whole, spent["dit"] = sum(spent.values()), spent["forward"] + spent["backward"]
    spent["step"], cached, most = whole, spent["dit"] + spent["optimizer"], max(watch.peak.values())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    peak, lines = cfg.peak or next((value for card, value in PEAKS.items() if card in name), 0), []
    for stage, seconds in spent.items():
        tera, gb = cfg.batch * done.get(stage, 0) / 1e12, 2**20 / 1e9 * watch.peak.get(stage, most)
        lines.append([stage, f"{1e3 * seconds:.1f}", f"{seconds / whole:.0%}", f"{gb:.2f}",
                      *([f"{tera:.4g}", f"{tera / seconds:.4g}"] if tera else "--"),
                      f"{tera / seconds / peak:.1%}" if tera * peak else "-"])
    table(f"{cfg.preset}, {run.resolution} px, {name}, torch {torch.__version__}, {torch.get_num_threads()} "
          f"threads; mean of {cfg.steps} steps of {cfg.batch} images after 3 to warm up; MFU of "
          f"{peak or 'an unknown number of'} TFLOP/s, see --peak",
          ("stage", "ms, measured", "share", "GB, measured", "TFLOP, counted", "TFLOP/s", "MFU"), lines)
    print(f"\nmeasured: {cfg.batch / whole:.4g} images/s, {cfg.batch / cached:.4g} from a cache of crops")


def main():
    cfg = cli(Config, {name: {} for name in train.PRESETS})
    if cfg.inputs not in ((), ("measure",)) or min(*cfg.mfu, cfg.steps, cfg.batch, cfg.gpus) <= 0:
        die("the only word is measure; --mfu, --steps, --batch and --gpus are positive")
    (measure if cfg.inputs else count)(cfg)


if __name__ == "__main__":
    launch(main)
