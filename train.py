"""Train the multi-step VOSR: flow matching under full and partial conditions (paper Eq. 1, Sec. 3.1-3.3).

    python train.py                                              # tiny, procedural pictures, any laptop
    python train.py --data photos/ --out out/mine                # the same on your photos
    torchrun --nproc_per_node=8 train.py --preset 0.5B --data /photos

The same command again resumes: same numbers as if it had never stopped. OUT/ gets log.jsonl, loss.png,
previews/ and step-*/ (model, EMA, optimizer); OUT/last names the newest complete one.
"""
import json
import math
import os
import shutil
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import cli, launch, show
from data import Crops, degrade, describe, keyed_generator, open_source, write_image, write_whole
from model import (
    GRID,
    LATENT_CHANNELS,
    VOSR,
    DiT,
    ModelConfig,
    TinySemanticEncoder,
    choose_device,
    frozen_paths,
    load_semantic_encoder,
    load_strict,
    load_vae,
    read_tensors,
    settings,
    start_from,
)

# Table 5 of the paper: 256 px first, then 512 px from the 256 px weights (--init).
LARGE = dict(degradation="full", cache=0, lr_decay=0.0, ema_decay=0.9999, num_workers=8, save_every=10_000)
STAGE_256 = dict(resolution=256, train_batch_size=1024, learning_rate=1e-4, max_train_steps=400_000, **LARGE)
STAGE_512 = dict(resolution=512, train_batch_size=256, learning_rate=5e-5, max_train_steps=400_000, **LARGE)
SIZE_05B = dict(dim=1024, depth=28, num_heads=16, enc_dim=768, ae_type="sd2", layer_dinov2b_list=(8,))
SIZE_14B = dict(dim=1536, depth=36, num_heads=24, enc_dim=1024, ae_type="qwen", layer_dinov2b_list=(17,))
PRESETS = {
    "tiny": dict(dim=192, depth=6, num_heads=3, enc_dim=96, ae_type="tiny"),
    "0.5B": SIZE_05B | STAGE_256,
    "0.5B-512": SIZE_05B | STAGE_512,
    "1.4B": SIZE_14B | STAGE_256,
    "1.4B-512": SIZE_14B | STAGE_512,
}


@dataclass
class Config(ModelConfig):
    preset: str = "tiny"  # row of PRESETS; an option overrides a single value of it
    data: str = "procedural"  # folder, list of paths, tar or folder of tars, procedural; "a:3,b" mixes
    out: str = ""  # run folder; default out/PRESET
    weights: str = "weights"  # where the frozen autoencoder and semantic encoder are
    init: str = ""  # model folder whose weights start the run (the next stage, fine-tuning)
    export: str = ""  # when finished, also write the EMA weights into this family folder, half precision
    resolution: int = 128  # side of the HR crop in pixels
    degradation: str = "full+mild"  # full (Real-ESRGAN, as the paper), mild, or full+mild: half of each
    per_batch: bool = False  # most of the degradation is drawn once per batch, as by the official loader
    cache: int = 1024  # crops degraded and encoded once and kept in memory; 0 = new ones every step
    num_workers: int = 0  # processes that read photos; 0 = in the training process
    train_batch_size: int = 16  # images over all ranks, per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    max_train_steps: int = 600  # optimizer steps
    learning_rate: float = 1e-3  # AdamW, no warm-up (Table 5: 1e-4 at 256 px, 5e-5 at 512 px)
    lr_decay: float = 0.4  # last share of the run, in which the rate falls to 0; 0 = constant (Table 5)
    adam_beta2: float = 0.95  # beta1 is 0.9 (Table 5)
    weight_decay: float = 0.01  # on all parameters (Table 5)
    max_grad_norm: float = 1.0  # gradient clipping by the global norm (Table 5)
    ema_decay: float = 0.995  # average of the weights that is used for sampling; Table 5: 0.9999
    cfg_ratio: float = 0.1  # share of samples that see the partial condition (Sec. 3.3)
    alpha: tuple = (0.05, 0.25)  # range of the structural retention of the partial condition
    strength_mean: float = 5.0  # c_str noise: strength = sigmoid(N(mean, 1)); 99 = none, as in the paper
    seed: int = 42  # decides every random number of the run
    save_every: int = 500  # steps between checkpoints and previews; the newest two are kept
    log_every: int = 20  # steps between log lines
    device: str = "auto"  # cuda, mps, cpu in that order
    compile: bool = False  # torch.compile each block; pays off after some minutes


# ---------------------------------------------------------------- the objective
def per_sample(x):
    """(B,) -> (B, 1, 1, 1); a plain number stays what it is."""
    return x.view(-1, 1, 1, 1) if torch.is_tensor(x) else x


def mix_conditions(c_str, c_sem, partial, alpha, strength, struct_noise):
    """kappa of each sample (Sec. 3.3): (alpha c_str, no semantics) where partial is set, else (c_str, c_sem).

    strength mixes noise into c_str of full samples, as the published models were trained; 1 = the paper.
    Returns the mixed c_str and c_sem, and the noisy c_str of all samples, which a teacher sees.
    """
    noisy = strength * c_str + (1 - strength**2) ** 0.5 * struct_noise
    mixed = torch.where(per_sample(partial), alpha * c_str, noisy)
    return mixed, torch.where(partial.view(-1, 1, 1), 0.0, c_sem), noisy


def flow_loss(net, z0, c_str, c_sem, t, noise, partial, alpha, strength=1.0, struct_noise=0.0):
    """Multi-step objective, paper Eq. 1: mean of || v_theta(z_t, t, kappa) - v ||^2, a float32 scalar.

    z0, c_str, noise, struct_noise (B, C, h, w); c_sem (B, N, enc_dim); t (B,); alpha, strength (B,) or
    numbers; partial (B,) bool.
    """
    t_, alpha, strength = map(per_sample, (t, alpha, strength))
    z_t = (1 - t_) * z0 + t_ * noise                                            # Sec. 3.1
    c_str, c_sem, _ = mix_conditions(c_str, c_sem, partial, alpha, strength, struct_noise)
    v = net(z_t, t, c_str, c_sem)                                               # (B, C, h, w)
    return F.mse_loss(v.float(), (noise - z0).float())


def draw(cfg, z0, generator):
    """Everything random of one flow_loss call, per sample."""
    def uniform():
        return torch.rand(len(z0), generator=generator, device=z0.device)

    def normal(shape):
        return torch.randn(shape, generator=generator, device=z0.device)

    low, high = cfg.alpha
    return dict(t=uniform(), noise=normal(z0.shape), partial=uniform() < cfg.cfg_ratio,
                alpha=low + (high - low) * uniform(),
                strength=torch.sigmoid(cfg.strength_mean + normal(len(z0))), struct_noise=normal(z0.shape))


class Objective(nn.Module):
    """The loss as a module: one forward of DDP covers whatever networks and passes the loss uses."""

    def __init__(self, net, loss_fn):
        super().__init__()
        self.net, self.loss_fn = net, loss_fn

    def forward(self, batch, generator):
        return self.loss_fn(self.net, batch, generator)


# ---------------------------------------------------------------- data
def place(name="auto"):
    """Rank, number of ranks and device of this process; joins the group when torchrun started it."""
    device = choose_device(name)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def degraded(hr, cfg, *key):
    """hr (B, 3, R, R) in [0, 1] -> its enlarged LR; the draws follow from the seed and `key`."""
    return degrade(hr, keyed_generator("cpu", cfg.seed, *key), cfg.degradation, per_batch=cfg.per_batch)


def batches(cfg, prepare, start, rank, world, device):
    """Yield what prepare(hr, lr) makes of each micro-batch from micro-batch number `start` on.

    prepare gets images (B, 3, R, R) in [-1, 1], lr enlarged to the size of hr; it returns tensors.
    """
    local = cfg.train_batch_size // world
    crops = Crops(open_source(cfg.data), cfg.resolution, cfg.seed)
    if rank == 0:
        print(describe(crops.source), flush=True)

    def load(numbers):
        """Micro-batches with these numbers; the numbers of the crops in them follow from rank and number."""
        first = (n * cfg.train_batch_size + rank * local for n in numbers)
        loader = torch.utils.data.DataLoader(crops, batch_sampler=(range(i, i + local) for i in first),
                                             num_workers=cfg.num_workers, pin_memory=device.type == "cuda")
        for number, batch in zip(numbers, loader, strict=True):
            hr, lr, paired = (part.to(device, non_blocking=True) for part in batch)
            made = degraded(hr / 255, cfg, "degrade", number, rank)
            yield prepare(hr / 127.5 - 1, torch.where(per_sample(paired), lr / 255, made) * 2 - 1)

    total = cfg.max_train_steps * cfg.gradient_accumulation_steps
    if not cfg.cache:
        yield from load(range(start, total))
        return
    count = math.ceil(cfg.cache / cfg.train_batch_size)
    bar = tqdm(load(range(count)), "crops", count, leave=False, disable=True if rank else None)
    kept = [torch.cat(parts) for parts in zip(*bar, strict=True)]
    for number in range(start, total):
        generator = keyed_generator("cpu", cfg.seed, "cache", number, rank)
        chosen = torch.randint(len(kept[0]), (local,), generator=generator).to(device)
        yield tuple(part[chosen] for part in kept)


# ---------------------------------------------------------------- checkpoints
def tensors_of(net, dtype=None):
    return {name: value.detach().to("cpu", dtype).contiguous() for name, value in net.state_dict().items()}


def save(cfg, done, net, ema, opt):
    """Write checkpoint OUT/step-DONE, let OUT/last name it, delete all but the newest two."""
    out, name = Path(cfg.out), f"step-{done:08d}"

    def write(folder):
        folder.mkdir()
        save_file(tensors_of(net), folder / "model.safetensors")
        save_file(tensors_of(ema), folder / "ema_model.safetensors")
        (folder / "args.json").write_text(json.dumps(settings(cfg), indent=1))
        torch.save({"step": done, "optimizer": opt.state_dict()}, folder / "state.pt")

    write_whole(out / name, write)
    write_whole(out / "last", lambda path: path.write_text(name + "\n"))
    for old in [path for path in sorted(out.glob("step-*")) if path.name < name][:-1]:
        shutil.rmtree(old)


MAY_CHANGE = ("out", "export", "device", "compile", "num_workers", "max_train_steps",
              "learning_rate", "lr_decay", "save_every", "log_every", "tau")


def resume(cfg, net, ema, opt):
    """Load the checkpoint that OUT/last names into net, ema and opt; returns its step, 0 if there is none.

    Raises ValueError when it was made with other settings than this call's, but for those that may change.
    """
    if not (Path(cfg.out) / "last").is_file():
        return 0
    folder = Path(cfg.out) / (Path(cfg.out) / "last").read_text().strip()
    stored = json.loads((folder / "args.json").read_text())
    for name, now in json.loads(json.dumps(asdict(cfg))).items():
        if name not in MAY_CHANGE and stored.get(name, now) != now:
            raise ValueError(f"{cfg.out} was started with --{name} {stored[name]}, this call has {now}: "
                             "use another --out")
    for part, file in ((net, folder / "model.safetensors"), (ema, folder / "ema_model.safetensors")):
        load_strict(part, read_tensors(file), file)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    opt.load_state_dict(state["optimizer"])
    return state["step"]


def export(folder, net, config, name="config.json", select=""):
    """Finished weights for sampling and for the next stage: half precision, with the settings beside them."""
    tensors = tensors_of(net, torch.float16)
    tensors = {n.removeprefix(select): value for n, value in tensors.items() if n.startswith(select)}

    def write(path):
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors")
        (path / name).write_text(json.dumps(config, indent=1))

    write_whole(folder, write)
    print(f"wrote {folder}")


# ---------------------------------------------------------------- the loop that train.py and distill.py share
@torch.no_grad()
def update_ema(ema, net, decay):
    """ema <- decay ema + (1 - decay) net; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for mean, now in zip(ema.buffers(), net.buffers(), strict=True):
        mean.copy_(now)


def rate(cfg, step):
    """Learning rate of a step: constant, then a cosine to 0 over the last share lr_decay of the run."""
    left = (cfg.max_train_steps - step) / max(cfg.lr_decay * cfg.max_train_steps, 1e-9)
    return cfg.learning_rate * (0.5 - 0.5 * math.cos(math.pi * min(left, 1)))


def plot_loss(log, path):
    """PNG of the loss over the steps, log: list of dicts with step and loss; the loss axis is logarithmic."""
    steps, losses = [row["step"] for row in log], [max(row["loss"], 1e-9) for row in log]
    low, high = min(losses), max(losses)
    span = math.log(max(high, 1.01 * low) / low)
    image = Image.new("RGB", (640, 360), "white")
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((40, 40, 600, 320), outline="gray")
    canvas.line([(40 + 560 * s / steps[-1], 320 - 280 * math.log(v / low) / span)
                 for s, v in zip(steps, losses, strict=True)], fill="blue", width=2)
    canvas.text((40, 328), f"loss {low:.4g} to {high:.4g}, step 0 to {steps[-1]}", fill="black")
    write_whole(path, image.save)


def run(cfg, net, loss_fn, prepare, preview):
    """Train `net` and return its EMA: the mathematics is loss_fn(net, batch, generator) -> scalar.

    prepare(hr, lr) -> batch, without gradients (see batches); preview(ema) -> (rows, B, 3, H, W) in [-1, 1].
    """
    rank, world, device = place(cfg.device)
    if cfg.train_batch_size % world:
        raise ValueError(f"--train_batch_size is {cfg.train_batch_size}, not a multiple of {world} ranks")
    Path(cfg.out, "previews").mkdir(parents=True, exist_ok=True)
    if rank == 0:
        show(cfg)
    net = net.to(device)
    if cfg.init:
        start_from(cfg.init, net)
    ema = deepcopy(net).requires_grad_(False).eval()
    trained = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=cfg.learning_rate, betas=(0.9, cfg.adam_beta2), eps=1e-8,
                            weight_decay=cfg.weight_decay, fused=True)
    start = resume(cfg, net, ema, opt)
    log_path = Path(cfg.out, "log.jsonl")
    lines = log_path.read_text().split("\n")[:-1] if log_path.is_file() else []  # a half line is dropped
    log = [row for row in map(json.loads, lines) if row["step"] <= start]
    if rank == 0:
        for half in Path(cfg.out).glob(".step-*"):                          # of a run that was killed
            shutil.rmtree(half)
        print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {world} x {device}"
              + (f", resumed at step {start}" if start else "")
              + (", already finished" if start >= cfg.max_train_steps else ""))
        write_whole(log_path, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in log)))
        write_whole(Path(cfg.out, "args.json"), lambda p: p.write_text(json.dumps(settings(cfg), indent=1)))
    for block in net.blocks if cfg.compile and hasattr(net, "blocks") else ():
        block.compile()
    objective = Objective(net, loss_fn)
    ddp = DistributedDataParallel(objective) if world > 1 else objective
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    micros = cfg.gradient_accumulation_steps
    stream = batches(cfg, prepare, start * micros, rank, world, device)
    logged, tick = start, time.perf_counter()

    for step in range(start, cfg.max_train_steps):
        for group in opt.param_groups:
            group["lr"] = rate(cfg, step)
        loss = 0.0
        for micro in range(micros):
            if world > 1:
                ddp.require_backward_grad_sync = micro == micros - 1        # one all-reduce per step
            generator = keyed_generator(device, cfg.seed, step, micro, rank)  # resumed: same numbers
            batch = next(stream)
            with autocast:
                part = ddp(batch, generator) / micros
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
        opt.step()
        opt.zero_grad(set_to_none=True)
        update_ema(ema, net, cfg.ema_decay)

        done = step + 1
        saving = done == cfg.max_train_steps or done % cfg.save_every == 0
        if saving or done % cfg.log_every == 0:
            if world > 1:
                dist.all_reduce(loss)
            row = dict(step=done, loss=float(loss) / world, grad=float(norm), learning_rate=rate(cfg, step))
            if not math.isfinite(row["loss"] + row["grad"]):                # nothing of it is ever saved
                raise FloatingPointError(f"loss {row['loss']} at step {done}: lower --learning_rate, go on")
            images, seconds = cfg.train_batch_size * micros * (done - logged), time.perf_counter() - tick
            row["images_per_s"], logged, tick = images / seconds, done, time.perf_counter()
            if rank == 0:
                log.append(row)
                print(f"step {done:>7} | loss {row['loss']:.4f} | grad {row['grad']:.2f} | "
                      f"{row['images_per_s']:.1f} images/s", flush=True)
                with open(log_path, "a") as file:
                    file.write(json.dumps(row) + "\n")
        if rank == 0 and saving:
            save(cfg, done, net, ema, opt)
            plot_loss(log, Path(cfg.out, "loss.png"))
            with torch.no_grad():
                rows = preview(ema).clamp(-1, 1) * 0.5 + 0.5                 # (rows, B, 3, H, W)
            sheet = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, rows H, B W)
            write_image(Path(cfg.out, "previews", f"{done:08d}.png"), sheet.float().cpu())
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return ema


# ---------------------------------------------------------------- the multi-step model
def frozen(cfg, device):
    """Bundle of what is not trained here: autoencoder and, where one is published, semantic encoder."""
    vae_path, semantic_path = frozen_paths(cfg, cfg.weights)
    paths = [vae_path] if cfg.ae_type == "tiny" else [vae_path, semantic_path]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"missing: {', '.join(missing)}; see the README, --weights names another folder")
    semantic = load_semantic_encoder(semantic_path, cfg) if semantic_path in paths else None
    return VOSR(None, load_vae(vae_path), semantic).to(device).eval().requires_grad_(False)


def preview_pairs(cfg, device, count=4):
    """The first photos of the source, degraded: hr, lr (count, 3, R, R) in [-1, 1]."""
    source = open_source(cfg.data)
    hr = torch.stack([Crops(source, cfg.resolution, cfg.seed)[i][0] for i in range(count)]).to(device) / 255
    return hr * 2 - 1, degraded(hr, cfg, "preview") * 2 - 1


def check(cfg):
    """Wrong values end here, before anything is loaded."""
    if cfg.ae_type not in LATENT_CHANNELS:
        raise ValueError(f"--ae_type is one of {', '.join(LATENT_CHANNELS)}, got {cfg.ae_type!r}")
    counts = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "save_every", "log_every")
    if low := [name for name in counts if getattr(cfg, name) < 1]:
        raise ValueError(f"--{low[0]} starts at 1, got {getattr(cfg, low[0])}")
    if cfg.dim % (4 * cfg.num_heads) or cfg.resolution < 32 or cfg.resolution % GRID:
        raise ValueError(f"--dim is a multiple of 4 x --num_heads, --resolution of {GRID} from 32 on; got "
                         f"{cfg.dim}, {cfg.num_heads}, {cfg.resolution}")


def main():
    cfg = cli(Config, PRESETS)
    cfg.out = cfg.out or f"out/{cfg.preset}"
    check(cfg)
    rank, _, device = place(cfg.device)
    vosr = frozen(cfg, device)
    torch.manual_seed(cfg.seed)                                       # initial weights, alike on all ranks
    net = DiT(cfg)
    if cfg.ae_type == "tiny":                                           # nothing to borrow: it learns along
        net.semantic_encoder = TinySemanticEncoder(cfg.enc_dim)
    hr, lr = preview_pairs(cfg, device)

    @torch.no_grad()
    def prepare(hr, lr):
        z0, c_str = vosr.encode(torch.cat([hr, lr])).chunk(2)
        return z0, c_str, vosr.semantic_tokens(lr) if vosr.semantic_encoder else lr  # tiny: see tokens

    def tokens(net, c_sem):
        return net.semantic_encoder(c_sem) if cfg.ae_type == "tiny" else c_sem

    def loss_fn(net, batch, generator):
        z0, c_str, c_sem = batch
        return flow_loss(net, z0, c_str, tokens(net, c_sem), **draw(cfg, z0, generator))

    def preview(net):
        """Rows: LR, what the network believes at t = 1 and at t = 0.5 (z_t - t v), HR."""
        z0, c_str, c_sem = prepare(hr, lr)
        noise = torch.randn(z0.shape, generator=keyed_generator(device, cfg.seed, "noise"), device=device)
        rows = [lr]
        for t in (1.0, 0.5):
            z_t = (1 - t) * z0 + t * noise
            v = net(z_t, z0.new_full((len(z0),), t), c_str, tokens(net, c_sem))
            rows.append(vosr.decode(z_t - t * v))
        return torch.stack([*rows, hr])

    ema = run(cfg, net, loss_fn, prepare, preview)
    if cfg.export and rank == 0:
        if cfg.ae_type == "tiny":
            export(Path(cfg.export, "semantic"), ema, {"enc_dim": cfg.enc_dim}, select="semantic_encoder.")
            del ema.semantic_encoder
        export(Path(cfg.export, "ms"), ema, settings(cfg, paths=False), "args.json")


if __name__ == "__main__":
    launch(main)
