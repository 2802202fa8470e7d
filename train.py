"""Train the multi-step VOSR: flow matching under full and partial conditions (paper Eq. 1, Sec. 3.1-3.3).

    python train.py --data photos/ --out out/mine                # tiny; without --data on procedural pictures
    torchrun --nproc_per_node=8 train.py --preset 0.5B --data /photos

The same command again resumes: same numbers as if it had never stopped. OUT/ gets log.jsonl, loss.png,
previews/ and step-*/ (model, EMA, optimizer); OUT/last names the newest complete one.
"""
import functools
import json
import math
import os
import shutil
import signal
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import model
from config import cli, launch, show, validate
from data import Crops, degrade, describe, keyed_generator, open_source, write_image, write_whole

# Table 5 of the paper: 256 px first, then 512 px from the 256 px weights (--init).
LARGE = dict(degradation="full", cache=0, lr_decay=0.0, ema_decay=0.9999, num_workers=8, save_every=10_000)
STAGE_256 = dict(resolution=256, train_batch_size=1024, learning_rate=1e-4, max_train_steps=400_000, **LARGE)
STAGE_512 = dict(resolution=512, train_batch_size=256, learning_rate=5e-5, max_train_steps=400_000, **LARGE)
GUIDANCE = {"partial": {}, "uncond": dict(alpha=(0.0, 0.0)), "full": dict(cfg_ratio=0.0)}  # Table 7
SIZE_05B = dict(dim=1024, depth=28, num_heads=16, enc_dim=768, ae_type="sd2", layer_dinov2b_list=(8,))
SIZE_14B = dict(dim=1536, depth=36, num_heads=24, enc_dim=1024, ae_type="qwen", layer_dinov2b_list=(17,))
PRESETS = {
    "tiny": dict(dim=192, depth=6, num_heads=3, enc_dim=96, ae_type="tiny"),
    "0.5B": SIZE_05B | STAGE_256, "0.5B-512": SIZE_05B | STAGE_512,
    "1.4B": SIZE_14B | STAGE_256, "1.4B-512": SIZE_14B | STAGE_512,
}


@dataclass
class Config(model.ModelConfig):
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
    guidance: str = "partial"  # the auxiliary branch (Table 7): partial, uncond (alpha 0), or full (none)
    cfg_ratio: float = 0.1  # share of samples that see the partial condition (Sec. 3.3)
    alpha: tuple = (0.05, 0.25)  # range of their structural retention
    strength_mean: float = 5.0  # c_str noise: strength = sigmoid(N(mean, 1)); 99 = none, as in the paper
    val_data: str = ""  # source of held-out pictures: the EMA's loss on 64 crops is logged with checkpoints
    seed: int = 42  # decides every random number of the run
    save_every: int = 500  # steps between checkpoints and previews
    keep: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for good; 0 = none
    log_every: int = 20  # steps between log lines
    device: str = "auto"  # cuda, mps, cpu in that order
    compile: bool = False  # torch.compile each block; pays off after some minutes
    recompute: bool = False  # activations again in the backward pass: a third more work, far less memory
    shard: bool = False  # FSDP2: weights, EMA and moments in slices over the ranks; for small cards and 1.4B


# ---------------------------------------------------------------- the objective
def mix_conditions(c_str, c_sem, partial, alpha, strength, struct_noise):
    """kappa of each sample (Sec. 3.3): (alpha c_str, no semantics) where partial is set, else (c_str, c_sem).
    strength mixes noise into c_str of full samples, as the published models were trained; 1 = the paper.
    Returns the mixed c_str and c_sem, and the noisy c_str of all samples, which a teacher sees."""
    noisy = strength * c_str + (1 - strength**2) ** 0.5 * struct_noise
    mixed = torch.where(model.per_sample(partial), alpha * c_str, noisy)
    return mixed, torch.where(partial.view(-1, 1, 1), 0.0, c_sem), noisy


def flow_loss(net, z0, c_str, c_sem, t, noise, partial, alpha, strength=1.0, struct_noise=0.0, log=None):
    """Multi-step objective, paper Eq. 1: mean of || v_theta(z_t, t, kappa) - v ||^2, a float32 scalar.
    z0, c_str, noise, struct_noise (B, C, h, w); c_sem (B, N, enc_dim); t (B,); alpha, strength (B,) or
    numbers; partial (B,) bool. log (2, 4): sums and numbers of samples by quarters of t are added to it."""
    t_, alpha, strength = map(model.per_sample, (t, alpha, strength))
    z_t = (1 - t_) * z0 + t_ * noise                                            # Sec. 3.1
    c_str, c_sem, _ = mix_conditions(c_str, c_sem, partial, alpha, strength, struct_noise)
    v = net(z_t, t, c_str, c_sem)                                               # (B, C, h, w)
    errors = (v.float() - (noise - z0).float()).square().mean((1, 2, 3))        # (B,)
    if log is not None:
        rows = torch.stack([errors.detach(), torch.ones_like(errors)])
        log.index_add_(1, (4 * t).long().clamp(max=3), rows)
    return errors.mean()


def draw(cfg, z0, generator):
    """Everything random of one flow_loss call, per sample."""
    b, by_generator = len(z0), dict(generator=generator, device=z0.device)
    return dict(t=torch.rand(b, **by_generator), noise=torch.randn(z0.shape, **by_generator),
                partial=torch.rand(b, **by_generator) < cfg.cfg_ratio,
                alpha=cfg.alpha[0] + (cfg.alpha[1] - cfg.alpha[0]) * torch.rand(b, **by_generator),
                strength=torch.sigmoid(cfg.strength_mean + torch.randn(b, **by_generator)),
                struct_noise=torch.randn(z0.shape, **by_generator))


class Within(torch.nn.ModuleList):
    """function(net, ...) as a module: one forward of DDP or FSDP covers all networks and passes it uses."""
    def forward(self, function, *arguments):
        return function(self[0], *arguments)


# ---------------------------------------------------------------- data
def place(name="auto"):
    """Rank, number of ranks and device of this process; joins the group when torchrun started it."""
    device = model.choose_device(name)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def pair(batch, cfg, device, *key):
    """Crops by data.Crops -> hr, lr (B, 3, R, R) in [-1, 1]; an lr that is no picture of its own is drawn."""
    hr, lr, paired = (part.to(device, non_blocking=True) for part in batch)
    made = hr if batch[2].all() else degrade(  # pairs alone need none
        hr / 255, keyed_generator("cpu", cfg.seed, *key), cfg.degradation, per_batch=cfg.per_batch)
    return hr / 127.5 - 1, torch.where(model.per_sample(paired), lr / 255, made) * 2 - 1


def deaf(leaving, worker):
    """Batch systems and torchrun send SIGTERM to data workers, too, which are needed until the run leaves."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving else None)


def batches(cfg, prepare, start, rank, world, device):
    """Yield prepare(hr, lr) of each micro-batch from number `start` on; both (B, 3, R, R) in [-1, 1]."""
    local, leaving = cfg.train_batch_size // world, torch.zeros(1)
    Finalize(None, (leaving.share_memory_() if cfg.num_workers else leaving).fill_, (1,), exitpriority=0)
    crops = Crops(open_source(cfg.data), cfg.resolution, cfg.seed)
    if rank == 0:
        print(describe(crops.source), flush=True)
    def load(numbers):
        first = (n * cfg.train_batch_size + rank * local for n in numbers)
        loader = DataLoader(crops, batch_sampler=(range(i, i + local) for i in first),
                            num_workers=cfg.num_workers, pin_memory=device.type == "cuda",
                            worker_init_fn=functools.partial(deaf, leaving))
        try:
            for number, batch in zip(numbers, loader, strict=True):
                yield prepare(*pair(batch, cfg, device, "degrade", number, rank))
        except (ConnectionError, EOFError) as error:
            raise RuntimeError(f"DataLoader worker, or what it read, is gone: {error!r}") from None
    total = cfg.max_train_steps * cfg.gradient_accumulation_steps
    if not cfg.cache:
        return (yield from load(range(start, total)))
    count = math.ceil(cfg.cache / cfg.train_batch_size)
    bar = tqdm(load(range(count)), "crops", count, leave=False, disable=True if rank else None)
    kept = [torch.cat(parts) for parts in zip(*bar, strict=True)]
    for number in range(start, total):
        generator = keyed_generator("cpu", cfg.seed, "cache", number, rank)
        chosen = torch.randint(len(kept[0]), (local,), generator=generator).to(device)
        yield tuple(part[chosen] for part in kept)


# ---------------------------------------------------------------- checkpoints
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0; all take part
MAY_CHANGE = ("out", "export", "device", "compile", "recompute", "shard", "num_workers", "max_train_steps",
              "keep", "keep_every", "val_data", "learning_rate", "lr_decay", "save_every", "log_every", "tau")


def tensors_of(part):
    """Tensors of the network in a Within, by its own names."""
    tensors = states.get_model_state_dict(part, options=WHOLE)
    return {name.removeprefix("0."): value.contiguous() for name, value in tensors.items()}


def save(cfg, done, ddp, mean, opt):
    """Write checkpoint OUT/step-DONE, let OUT/last name it, delete old ones; what fails leaves the others."""
    out, name, (rank, world, _) = Path(cfg.out), f"step-{done:08d}", place(cfg.device)
    parts = {"model.safetensors": tensors_of(ddp), "ema_model.safetensors": tensors_of(mean)}
    state = dict(step=done, world=world, optimizer=states.get_optimizer_state_dict(ddp, opt, options=WHOLE))
    if rank:
        return
    def write(folder):
        folder.mkdir()
        for file, tensors in parts.items():
            save_file(tensors, folder / file)
        (folder / "args.json").write_text(json.dumps(model.settings(cfg), indent=1))
        torch.save(state, folder / "state.pt")
    try:
        write_whole(out / name, write)
        write_whole(out / "last", lambda path: path.write_text(name + "\n"))
    except (OSError, RuntimeError, SafetensorError) as reason:
        raise (reason if str(reason).startswith("DataLoader worker") else ValueError(
            f"{out / name} cannot be written, those before it are whole: {reason}")) from None
    for path in sorted(p for p in out.glob("step-*") if p.name < name)[:1 - cfg.keep or None]:
        if not cfg.keep_every or int(path.name[5:]) % cfg.keep_every:
            shutil.rmtree(path.rename(out / f".half.{path.name}"), ignore_errors=True)  # whole, or gone


def resume(cfg, net, ema):
    """Load the newest checkpoint of OUT, if any, into net and ema; returns its step and all else.
    ValueError when it was made with other settings than this call's, but for those that may change."""
    if (folder := model.model_folder(cfg.out)) == Path(cfg.out):
        return {"step": 0}
    _, stored = model.read_settings(folder)
    for name, now in json.loads(json.dumps(asdict(cfg))).items():
        if name not in MAY_CHANGE and stored.get(name, now) != now:
            raise ValueError(f"{folder} has --{name} {stored[name]}, this call {now}: use another --out")
    for part, file in ((net, folder / "model.safetensors"), (ema, folder / "ema_model.safetensors")):
        model.load_strict(part, model.read_tensors(file), file)
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def export(folder, tensors, config, name="config.json"):
    """Finished weights for sampling and for the next stage: half precision, with the settings beside them."""
    def write(path):
        path.mkdir(parents=True)
        save_file({n: value.half() for n, value in tensors.items()}, path / "model.safetensors")
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
    """PNG of the losses over the steps, on a logarithmic scale; log: list of dicts with step and loss."""
    steps, ys = zip(*((row["step"], math.log(max(row["loss"], 1e-9))) for row in log), strict=True)
    low, high, canvas = min(ys), max(ys), ImageDraw.Draw(image := Image.new("RGB", (640, 360), "white"))
    canvas.text((40, 328), f"loss {math.exp(low):.4g} to {math.exp(high):.4g}, to step {steps[-1]}", "black")
    canvas.line([(40 + 560 * step / steps[-1], 320 - 280 * (y - low) / max(high - low, 0.01))
                 for step, y in zip(steps, ys, strict=True)], "blue", 2)
    write_whole(path, image.save)


def run(cfg, net, loss_fn, prepare, preview):
    """Train `net`, return the tensors of its EMA: the mathematics is loss_fn(net, batch, generator, log).
    prepare(hr, lr) -> batch, without gradients (see batches); preview(ema) -> (rows, B, 3, H, W) in [-1, 1].
    SIGTERM makes it write a checkpoint and end the process with code 0. FloatingPointError: it diverged."""
    rank, world, device = place(cfg.device)
    if cfg.train_batch_size % world or (cfg.shard and world == 1):
        raise ValueError(f"--train_batch_size {cfg.train_batch_size} is not a multiple of {world} ranks"
                         if world > 1 else "--shard divides over the ranks of torchrun, here is one")
    out, net = Path(cfg.out), net.to(device)
    (out / "previews").mkdir(parents=True, exist_ok=True)
    if cfg.init and not (out / "last").is_file():
        model.start_from(cfg.init, net)
    ema, net.recompute = deepcopy(net).requires_grad_(False).eval(), cfg.recompute
    start, weights = (state := resume(cfg, net, ema))["step"], sum(p.numel() for p in net.parameters())
    for half in [*out.glob(".half.*"), *out.glob("previews/.half.*")] if rank == 0 else ():
        shutil.rmtree(half) if half.is_dir() else half.unlink()             # of a run that was killed
    if rank == 0 and (free := shutil.disk_usage(out).free) < (need := 2 * 16 * weights):  # bytes
        raise ValueError(f"{out}: {free / 1e9:.1f} GB are free, two checkpoints take {need / 1e9:.1f}")
    lines = (out / "log.jsonl").read_text().split("\n")[:-1] if (out / "log.jsonl").is_file() else []
    log = [row for row in map(json.loads, lines) if row["step"] <= start]     # a half line was dropped
    if rank == 0:
        show(cfg)
        print(f"{weights / 1e6:.2f} M parameters, {world} x {device}, {start} of {cfg.max_train_steps} steps")
        if state.get("world", world) != world:
            print(f"{state['world']} ranks before: weights (uncached crops, too) go on, random draws differ")
        write_whole(out / "log.jsonl", lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in log)))
        write_whole(out / "args.json", lambda p: p.write_text(json.dumps(model.settings(cfg), indent=1)))
    for block in getattr(net, "blocks", ()) if cfg.compile else ():
        block.compile()
    ddp, mean = Within([net]), Within([ema])
    if cfg.shard:                                                           # one block is whole at a time
        mesh = init_device_mesh(device.type, (world,))
        for part in (*getattr(net, "blocks", ()), *getattr(ema, "blocks", ()), ddp, mean):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)        # the root, too: it has an EMA
    elif world > 1:
        ddp = DistributedDataParallel(ddp)
    trained = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=cfg.learning_rate, betas=(0.9, cfg.adam_beta2), eps=1e-8,
                            weight_decay=cfg.weight_decay, fused=True)
    if start:
        states.set_optimizer_state_dict(ddp, opt, optim_state_dict=state["optimizer"], options=WHOLE)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    micros, seen = cfg.gradient_accumulation_steps, cfg.gradient_accumulation_steps * cfg.train_batch_size
    stream = batches(cfg, prepare, start * micros, rank, world, device)
    mine = range(max(64, world))[rank::world] if cfg.val_data else ()       # held-out crops, 8 at a time
    val = [preview_pairs(cfg, device, cfg.val_data, mine[i:i + 8]) for i in range(0, len(mine), 8)]
    status, stop = torch.zeros(11 + world, device=device), []  # since the last line: loss, by t, val; bad
    by_t = status[1:9].view(2, 4)
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    all_reduce = dist.all_reduce if world > 1 else id
    logged, waited, tick = start, 0.0, time.perf_counter()

    for step in range(start, cfg.max_train_steps):
        opt.param_groups[0]["lr"] = rate(cfg, step)
        loss = 0.0
        for micro in range(micros):
            ddp.require_backward_grad_sync = micro == micros - 1            # one all-reduce of DDP per step
            with autocast:                                                  # of the frozen networks, too
                waited -= time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter()
                new = ddp(loss_fn, batch, keyed_generator(device, cfg.seed, step, micro, rank), by_t) / micros
            new.backward()
            loss += new.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.max_grad_norm)
        norm = norm.full_tensor() if cfg.shard else norm
        opt.found_inf = (~norm.isfinite()).float()                          # then nothing changes
        opt.step()
        opt.zero_grad(set_to_none=True)
        update_ema(ema, net, cfg.ema_decay)

        done, stopping = step + 1, torch.tensor(len(stop))
        all_reduce(stopping)                                                # on the host, as GPUs are not
        saving = stopping or done == cfg.max_train_steps or done % cfg.save_every == 0
        status[0] += loss
        for slot, value in ((10, norm), (11 + rank, loss)):
            status[slot] += done * ((status[slot] == 0) & ~value.isfinite())
        if not saving and done % cfg.log_every:                             # waited for but when logging
            continue
        with autocast:
            for i, pairs in enumerate(val if saving else ()):
                generator = keyed_generator(device, cfg.seed, "val", rank, i)
                status[9] += mean(loss_fn, prepare(*pairs), generator, None) * len(pairs[0]) / max(64, world)
        all_reduce(status)
        total = status.tolist()
        status.zero_()
        if bad := round(total[10] / world):
            raise FloatingPointError(f"not finite: step {bad}, crops from {(bad - 1) * seen}, rank "
                f"{[k for k in range(world) if total[11 + k]] or 'all'}; lower --learning_rate and resume")
        seconds, steps = time.perf_counter() - tick, done - logged
        row = dict(step=done, loss=total[0] / world / steps, grad=float(norm), waiting=waited / seconds,
                   learning_rate=rate(cfg, step), images_per_s=seen * steps / seconds)
        row |= {f"loss_t{n}": total[1 + n] / total[5 + n] for n in range(4) if total[5 + n]}
        row |= {"val": total[9]} if saving and cfg.val_data else {}
        row |= {"gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
        logged, waited, tick = done, 0.0, time.perf_counter()
        if rank == 0:
            log.append(row)
            print(" | ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        if saving:                                                          # by all ranks, which may gather
            save(cfg, done, ddp, mean, opt)
            sheet = mean(preview).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, rows H, B W)
            if rank == 0:
                plot_loss(log, out / "loss.png")
                write_image(out / "previews" / f"{done:08d}.png", sheet.float().cpu() * 0.5 + 0.5)
        if stopping:
            raise SystemExit(print(f"stopped by SIGTERM after step {done}; the same command goes on"))
    tensors = tensors_of(mean)
    if world > 1:
        dist.destroy_process_group()
    return tensors


# ---------------------------------------------------------------- the multi-step model
def frozen(cfg, device):
    """Bundle of what is not trained here: autoencoder and, where one is published, semantic encoder."""
    parts = model.load_frozen(cfg, cfg.weights, semantic=cfg.ae_type != "tiny" or not cfg.semantics)
    return model.VOSR(None, *parts).to(device).eval().requires_grad_(False)


def preview_pairs(cfg, device, source="", numbers=range(4)):
    """Crops with these numbers, of the source or of --data -> hr, lr (n, 3, R, R) in [-1, 1]."""
    crops = Crops(open_source(source or cfg.data), cfg.resolution, cfg.seed)
    return pair(default_collate([crops[i] for i in numbers]), cfg, device, "preview", numbers[0])


def check(cfg):
    """Wrong values end here, before anything is loaded."""
    counts = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "save_every", "log_every")
    validate(cfg, ae_type=model.LATENT_CHANNELS, guidance=GUIDANCE, resolution=32, **dict.fromkeys(counts, 1))
    vars(cfg).update(GUIDANCE[cfg.guidance])
    if cfg.dim % (4 * cfg.num_heads) or cfg.resolution % model.GRID:
        raise ValueError(f"--dim is a multiple of 4 x --num_heads, --resolution of {model.GRID} pixels")


def main():
    cfg = cli(Config, PRESETS)
    cfg.out = cfg.out or f"out/{cfg.preset}"
    check(cfg)
    rank, _, device = place(cfg.device)
    vosr = frozen(cfg, device)
    torch.manual_seed(cfg.seed)                                       # initial weights, alike on all ranks
    net = model.DiT(cfg)
    if learned := cfg.ae_type == "tiny" and cfg.semantics:              # nothing to borrow: it learns along
        net.semantic_encoder = model.TinySemanticEncoder(cfg.enc_dim)
    hr, lr = preview_pairs(cfg, device)

    def prepare(hr, lr):
        z0, c_str = vosr.encode(torch.cat([hr, lr])).float().chunk(2)
        return z0, c_str, vosr.semantic_tokens(lr) if vosr.semantic_encoder else lr  # tiny: see tokens

    def tokens(net, c_sem):
        return net.semantic_encoder(c_sem) if learned else c_sem
    def loss_fn(net, batch, generator, log):
        z0, c_str, c_sem = batch
        return flow_loss(net, z0, c_str, tokens(net, c_sem), **draw(cfg, z0, generator), log=log)

    def preview(net):
        """Rows: LR, 1, 5 and 25 Euler steps without guidance, HR."""
        z0, c_str, c_sem = prepare(hr, lr)
        noise = torch.randn(z0.shape, generator=keyed_generator(device, cfg.seed, "noise"), device=device)
        rows, c_sem = [lr], tokens(net, c_sem)
        for steps in (1, 5, 25):
            z = noise
            for n in range(steps, 0, -1):
                z = z - net(z, z0.new_full((len(z0),), n / steps), c_str, c_sem) / steps
            rows.append(vosr.decode(z))
        return torch.stack([*rows, hr])

    tensors = run(cfg, net, loss_fn, prepare, preview)
    if cfg.export and rank == 0:
        if mine := [name for name in tensors if name.startswith(model.BESIDE)]:
            export(Path(cfg.export, "semantic"), {n.removeprefix(model.BESIDE): tensors.pop(n) for n in mine},
                   {"enc_dim": cfg.enc_dim})
        export(Path(cfg.export, "ms"), tensors, model.settings(cfg, paths=False), "args.json")


if __name__ == "__main__":
    launch(main)
