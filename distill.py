"""Distil VOSR to one step (paper Sec. 3.4, A.1), and train the autoencoders around it (Sec. 4.1).

    python distill.py --method autoencoder                 # tiny encoder and decoder, from nothing
    python distill.py --method rc --teacher out/tiny/last  # recursive consistency, the paper's choice
    python distill.py --method shortcut                    # the variant it is compared with (Eq. 7-11)
    python distill.py --method decoder                     # light decoder retrained for SR on student latents

Loop, checkpoints and data are train.py's; here is only what is new. The same command again resumes.
"""
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

import train
from config import cli, die, launch, validate
from data import keyed_generator, write_whole
from model import (
    BESIDE,
    DiT,
    ModelConfig,
    TinyAutoencoder,
    both_branches,
    frozen_paths,
    load_dit,
    load_frozen,
    load_vae,
    model_folder,
    partial_condition,
    per_sample,
    read_json,
    sd_decoder,
    settings,
)
from train import check, export, frozen, mix_conditions, place, preview_pairs, run

LARGE = train.LARGE | dict(resolution=512, train_batch_size=32, learning_rate=2e-5, max_train_steps=50_000,
                           save_every=5_000)  # Table 5
DISTILL = {
    "tiny": train.PRESETS["tiny"] | dict(
        learning_rate=4e-4, max_train_steps=200, delta=0.02, corner=0.25, omega=1.0, ema_decay=0.99),
    "0.5B": train.SIZE_05B | LARGE,
    "1.4B": train.SIZE_14B | LARGE,
}
PRESETS = {  # per method
    "rc": DISTILL,
    "shortcut": DISTILL,
    "autoencoder": {"tiny": train.PRESETS["tiny"] | dict(
        resolution=64, train_batch_size=32, learning_rate=2e-3, max_train_steps=300, lr_decay=1.0, cache=2048,
        ema_decay=0.98, weight_decay=0.0, adam_beta2=0.99)},
    "decoder": {"tiny": train.PRESETS["tiny"] | dict(
        train_batch_size=8, learning_rate=6e-4, max_train_steps=100, lr_decay=1.0, ema_decay=0.98,
        weight_decay=0.0, adam_beta2=0.99),
        "0.5B": train.SIZE_05B | LARGE | dict(                              # ours: the paper gives no recipe
            resolution=256, latents="hr", perceptual=0.1, learning_rate=1e-4, ema_decay=0.999)},
}


@dataclass
class Config(train.Config):
    method: str = "rc"  # rc, shortcut, autoencoder or decoder
    teacher: str = ""  # folder of the multi-step network (for decoder: of the student); default: the family's
    omega: float = 0.5  # guidance weight of the teacher target (Eq. 5)
    alpha: tuple = (0.1, 0.1)  # range of the structural retention; fixed in the published distillation
    u_weight: float = 1.0  # weight of the consistency loss (A.1)
    delta: float = 0.01  # Delta t of the warm start (Eq. 13); the paper gives no value
    rollout: int = 2  # sub-steps of the rollout (Eq. 14); the paper gives no value
    law: str = "larger"  # of t: larger (of two uniforms, as published), uniform, normal (its sigmoid)
    corner: float = 0.0  # share of samples at (t, r) = (1, 0), where one-step sampling is; paper: 0
    few: int = 1  # of corner: they lie at the jumps of sampling in this many equal steps
    tau: float = 1.0  # scale of the noise that the finished student starts from; 1 = the paper
    latent_noise: float = 0.1  # autoencoder: noise on the latent in units of its own spread
    latents: str = "student"  # decoder: learns from those of the student, for SR, or of hr, to reconstruct
    light: bool = False  # decoder: half as wide, from nothing; always so for SD2.1
    perceptual: float = 0.0  # decoder: weight of the mean squared difference of DINOv2's tokens


# ---------------------------------------------------------------- teacher target and base loss
def base_loss(student, teacher, z_t, t, kappa, full, weak, omega, interval=(0, 1)):
    """Base objective, Eq. 4 and 6, on the guided teacher velocity v_g of Eq. 5.

    kappa: the condition (c_str, c_sem) that the student sees; full, weak: the teacher's two. The guidance
    weight is omega for t inside the interval, 1 outside. Returns the loss and a dict of intermediates."""
    with torch.no_grad():
        v_cond, v_pcond = both_branches(teacher, z_t, t, full, weak)
        inside = (t >= interval[0]) & (t <= interval[1])
        v_guided = v_pcond + per_sample(torch.where(inside, omega, 1.0)) * (v_cond - v_pcond)      # Eq. 5
    v_pred = student(z_t, t, *kappa, r=t).float()
    v_loss = F.mse_loss(v_pred, v_guided)                                                          # Eq. 6
    return v_loss, dict(v_cond=v_cond, v_pcond=v_pcond, v_guided=v_guided, v_pred=v_pred, v_loss=v_loss)


def shared(net, c_sem):
    """Keys and values of c_sem in all blocks, once for all passes of a step; exact. Not where memory is
    short: recomputing would have to keep them, blocks in slices (--shard) are whole in forward only."""
    plain = isinstance(net, DiT) and not net.recompute and not isinstance(net.blocks[0], FSDPModule)
    return net.semantics(c_sem) if plain else c_sem


def conditions(student, teacher, z0, c_str, c_sem, t, noise, partial, strength, struct_noise, alpha):
    """z_t, the student's kappa, and the teacher's full and partial conditions."""
    t_, alpha, strength = map(per_sample, (t, alpha, strength))
    z_t = (1 - t_) * z0 + t_ * noise
    *kappa, noisy = mix_conditions(c_str, c_sem, partial, alpha, strength, struct_noise)
    kappa[1], c_sem = shared(student, kappa[1]), shared(teacher, c_sem)
    return z_t, kappa, (noisy, c_sem), partial_condition(c_str, c_sem, alpha)


# ---------------------------------------------------------------- the two variants, same signature
def shortcut_loss(student, teacher, z0, c_str, c_sem, t, r, noise, partial, strength=1.0, struct_noise=0.0,
                  alpha=0.1, omega=0.5, u_weight=1.0, interval=(0, 1), delta=None, rollout=None):
    """Shortcut variant, paper Eq. 7-11. Returns (loss, intermediates).

    z0, c_str, noise, struct_noise (B, C, h, w); c_sem (B, N, enc_dim); t, r (B,), r <= t; partial (B,) bool;
    strength (B,) or a number. delta and rollout belong to the other variant."""
    z_t, kappa, full, weak = conditions(student, teacher, z0, c_str, c_sem, t, noise, partial, strength,
                                        struct_noise, alpha)
    v_loss, parts = base_loss(student, teacher, z_t, t, kappa, full, weak, omega, interval)

    u = student(z_t, t, *kappa, r=r).float()                                    # u_{t->r}
    t_mid = (t + r) / 2                                                         # the paper's s
    with torch.no_grad():
        u_first = student(z_t, t, *kappa, r=t_mid).float()
        z_mid = z_t - per_sample(t - t_mid) * u_first                           # Eq. 7
        u_second = student(z_mid, t_mid, *kappa, r=r).float()                   # Eq. 8
        target = (u_first + u_second) / 2                                       # Eq. 9
    u_loss = F.mse_loss(u, target)                                              # Eq. 10
    loss = v_loss + u_weight * u_loss                                           # Eq. 11
    return loss, parts | dict(u_pred=u, u_first_half=u_first, z_mid=z_mid, u_second_half=u_second,
                              u_target=target, u_loss=u_loss, loss=loss)


def rc_loss(student, teacher, z0, c_str, c_sem, t, r, noise, partial, strength=1.0, struct_noise=0.0,
            alpha=0.1, omega=0.5, u_weight=1.0, interval=(0, 1), delta=0.01, rollout=2):
    """Recursive consistency, paper Eq. 12-17. Returns (loss, intermediates). Arguments as in shortcut_loss.

    What the paper leaves open follows the published models: the rollout is `rollout` equal Euler steps, its
    result is a displacement, and (c_l, c_r) = ((t - r) / delta, 1 / delta), or (1, 1 / (t - r)) once r is
    within delta. So (t - r) u = delta v_g + displacement at the fixed point. All of this stays float32: c_l
    magnifies rounding."""
    z_t, kappa, full, weak = conditions(student, teacher, z0, c_str, c_sem, t, noise, partial, strength,
                                        struct_noise, alpha)
    v_loss, parts = base_loss(student, teacher, z_t, t, kappa, full, weak, omega, interval)
    v_guided = parts["v_guided"]

    u = student(z_t, t, *kappa, r=r).float()                                    # Eq. 12
    with torch.no_grad():
        t_m = torch.maximum(t - delta, r)
        z_tm = z = z_t - per_sample(t - t_m) * v_guided                         # Eq. 13
        moved = torch.zeros_like(z)                                             # u_tar, as a displacement
        for i in range(rollout):
            a, b = (t_m * (1 - j / rollout) + r * (j / rollout) for j in (i, i + 1))
            step = per_sample(a - b) * student(z, a, *kappa, r=b).float()
            z, moved = z - step, moved + step
        distance = (t - r).clamp(min=1e-6)
        near = t < r + delta + 1e-6
        c_l = torch.where(near, 1.0, distance / delta)
        c_r = torch.where(near, 1 / distance, 1 / delta)
        corr = (per_sample(c_l) * u - per_sample(c_r) * moved - v_guided).clamp(-1, 1)             # Eq. 14
        target = u - corr                                                       # Eq. 15
    u_loss = F.mse_loss(u, target)                                              # Eq. 16
    loss = v_loss + u_weight * u_loss                                           # Eq. 17
    return loss, parts | dict(u_pred=u, t_m=t_m, z_tm=z_tm, rollout=moved, z_end=z, c_l=c_l, c_r=c_r,
                              corr=corr, u_target=target, u_loss=u_loss, loss=loss)


LAWS = {"larger": torch.maximum, "uniform": lambda u, _: u,                     # of t, from two uniforms
        "normal": lambda u, _: torch.special.ndtri(u).sigmoid()}


def draw(cfg, z0, generator):
    """Random inputs of both losses: t by its law, r uniform in [0, t], or a corner; else as train.py."""
    drawn = train.draw(cfg, z0, generator)
    u = torch.rand(5, len(z0), generator=generator, device=z0.device)
    t, corner, jump = LAWS[cfg.law](u[0], u[1]), u[3] < cfg.corner, (cfg.few * u[4]).floor()
    return drawn | dict(t=torch.where(corner, (jump + 1) / cfg.few, t),
                        r=torch.where(corner, jump / cfg.few, t * u[2]))


def one_step(student, z1, c_str, c_sem):
    """z0 = z1 - f_theta(z1, 1, 0): the whole sampler of a one-step network."""
    ones = z1.new_ones(len(z1))
    return z1 - student(z1, ones, c_str, c_sem, r=0 * ones).float()


def load_around(cfg, device, path, student):
    """Frozen bundle around the DiT of `path`; for tiny with the semantic encoder that it learned with.

    ValueError when that DiT is not of the shape of this run's, or not a student where one is wanted."""
    vosr = frozen(cfg, device)
    vosr.dit = load_dit(path).to(device).eval().requires_grad_(False)
    if vosr.dit.cfg.auxiliary_time_cond and not student:
        raise ValueError(f"{path} is a one-step network, --method {cfg.method} wants a multi-step one")
    if student and not vosr.dit.cfg.auxiliary_time_cond:
        raise ValueError(f"{path} is a multi-step network, --method {cfg.method} wants a one-step one")
    for field in fields(ModelConfig):
        mine, theirs = getattr(cfg, field.name), getattr(vosr.dit.cfg, field.name)
        if field.name != "auxiliary_time_cond" and mine != theirs:
            raise ValueError(f"{path} has {field.name} {theirs}, this run {mine}: choose its --preset, "
                             f"or give --{field.name}")
    if cfg.ae_type == "tiny":
        _, semantic = load_frozen(cfg, cfg.weights, path)
        vosr.semantic_encoder = semantic.to(device).eval().requires_grad_(False)
    cfg.auxiliary_time_cond = True                                              # what this run makes or uses
    return vosr


def distil(cfg, device):
    """Teacher -> one-step student by rc or shortcut; autoencoder and semantic encoder stay as they are."""
    family = {"tiny": "tiny/ms", "sd2": "VOSR_0.5B_ms", "qwen": "VOSR_1.4B_ms"}[cfg.ae_type]
    vosr = load_around(cfg, device, cfg.teacher or Path(cfg.weights, family), student=False)
    torch.manual_seed(cfg.seed)                                             # the embedder of r starts random
    student = DiT(cfg)
    student.load_state_dict(student.state_dict() | vosr.dit.state_dict())   # all else is the teacher's
    if cfg.ae_type == "tiny":                                               # frozen, kept in the checkpoints
        student.semantic_encoder = vosr.semantic_encoder
    consistency = {"rc": rc_loss, "shortcut": shortcut_loss}[cfg.method]

    @torch.no_grad()
    def prepare(hr, lr):
        z0, c_str = vosr.encode(torch.cat([hr, lr])).float().chunk(2)
        return z0, c_str, vosr.semantic_tokens(lr)

    def loss_fn(net, batch, generator, log):
        return consistency(net, vosr.dit, *batch, **draw(cfg, batch[0], generator), omega=cfg.omega,
                           u_weight=cfg.u_weight, delta=cfg.delta, rollout=cfg.rollout)[0]

    hr, lr = preview_pairs(cfg, device)

    def preview(net):
        """Rows: LR, one step from tau * noise, HR."""
        z0, c_str, c_sem = prepare(hr, lr)
        noise = torch.randn(z0.shape, generator=keyed_generator(device, cfg.seed, "noise"), device=device)
        return torch.stack([lr, vosr.decode(one_step(net, cfg.tau * noise, c_str, c_sem)), hr])

    tensors = run(cfg, student, loss_fn, prepare, preview)
    tensors = {n: v for n, v in tensors.items() if not n.startswith(BESIDE)}    # the family has it already
    return "os", tensors, settings(cfg, paths=False), "args.json"


# ---------------------------------------------------------------- autoencoders
def edges(x):
    """Differences of neighbouring pixels, right and down."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def pixel_loss(image, target):
    """L1 of the pixels plus half the L1 of the differences between neighbours, which asks for sharp edges."""
    pairs = zip(edges(image), edges(target), strict=True)
    return F.l1_loss(image, target) + 0.5 * sum(F.l1_loss(a, b) for a, b in pairs)


def autoencoder(cfg, device):
    """The tiny autoencoder from nothing, by reconstruction of HR and some LR crops.
    Noise on the latent makes the decoder forgive what a DiT gets wrong; the penalty keeps its scale finite.
    """
    torch.manual_seed(cfg.seed)

    def loss_fn(vae, batch, generator, log):
        z = vae.encoder(batch[0]).float()                                       # (B, 16, h, w), raw scale
        with torch.no_grad():                                               # running statistics of the latent
            vae.latents_mean.lerp_(z.mean((0, 2, 3), keepdim=True), 0.02)
            vae.latents_std.lerp_(z.std((0, 2, 3), keepdim=True), 0.02)
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        decoded = vae.decoder(z + cfg.latent_noise * z.std().detach() * noise)
        return pixel_loss(decoded, batch[0]) + 1e-4 * z.square().mean()

    def prepare(hr, lr):
        return (torch.cat([hr, lr[: len(lr) // 4]]),)

    hr, _ = preview_pairs(cfg, device)
    shape = {"latent_channels": 16, "widths": [64, 96]}
    vae = TinyAutoencoder(**shape).to(memory_format=torch.channels_last)        # 1.3 times faster on a CPU
    tensors = run(cfg, vae, loss_fn, prepare, lambda vae: torch.stack([hr, vae.decode(vae.encode(hr))]))
    return "vae", tensors, shape, "config.json"


def decoder(cfg, device):
    """The decoder retrained for SR (Sec. 4.1): from the student's one-step latents to the HR picture, or, by
    --latents hr, to reconstruct. All else is frozen. The loss is pixel_loss, and `perceptual` times the
    distance of DINOv2's tokens. Exporting the autoencoder stage again would put its own decoder back."""
    path = cfg.teacher or Path(cfg.weights, {"tiny": "tiny/os", "sd2": "VOSR_0.5B_os"}[cfg.ae_type])
    vae_path, from_hr = frozen_paths(cfg, cfg.weights)[0], cfg.latents == "hr"
    vosr = (frozen(replace(cfg, semantics=cfg.perceptual > 0), device) if from_hr else
            load_around(cfg, device, path, student=True))
    cfg.tau = 1.0 if from_hr else read_json(model_folder(path) / "args.json").get("tau", 1.0)  # used with it
    vae, config = load_vae(vae_path), read_json(vae_path / "config.json")
    torch.manual_seed(cfg.seed)
    if cfg.ae_type == "sd2":                                                # as the published light one
        config = dict(block_out_channels=[64, 128, 256, 256], layers_per_block=2, in_channels=4)
        vae.decoder, vae.post_quant_conv = sd_decoder(*config.values()), torch.nn.Identity()
        config["out_channels"] = 3
    elif cfg.light:
        config["decoder_widths"] = [n // 2 for n in config["widths"]]
        vae.decoder = TinyAutoencoder(**config).decoder
    vae.requires_grad_(False).decoder.requires_grad_(True)
    see = vosr.semantic_tokens if cfg.perceptual else None

    def prepare(hr, lr):
        return (hr, vosr.encode(hr)) if from_hr else (hr, vosr.encode(lr), vosr.semantic_tokens(lr))

    @torch.no_grad()
    def latents(batch, generator):
        noise = cfg.tau * torch.randn(batch[1].shape, generator=generator, device=device)
        return batch[1] if from_hr else one_step(vosr.dit, noise, *batch[1:])

    def loss_fn(vae, batch, generator, log):
        image = vae.decode(latents(batch, generator))
        loss = pixel_loss(image, batch[0])
        return loss + cfg.perceptual * F.mse_loss(see(image), see(batch[0])) if see else loss

    hr, lr = preview_pairs(cfg, device)

    def preview(vae):
        """Rows: LR, the decoder before, now, HR."""
        z0 = latents(prepare(hr, lr), keyed_generator(device, cfg.seed, "noise"))
        return torch.stack([lr, vosr.decode(z0), vae.decode(z0), hr])

    tensors = run(cfg, vae, loss_fn, prepare, preview)
    if cfg.ae_type == "tiny":
        return "vae", tensors, config, "config.json"
    tensors = {n.removeprefix("decoder."): v for n, v in tensors.items() if n.startswith("decoder.")}
    return "sd21_lwdecoder.pth", tensors, config, ""


def main():
    # Read twice: the method decides what the preset's row holds.
    method = cli(Config, PRESETS["autoencoder"] | PRESETS["rc"]).method
    methods = {"rc": distil, "shortcut": distil, "autoencoder": autoencoder, "decoder": decoder}
    if method not in methods:
        die(f"unknown method {method!r}, choose one of: {', '.join(methods)}")
    cfg = cli(Config, PRESETS[method])
    cfg.out = cfg.out or f"out/{cfg.preset}-{cfg.method}"
    check(cfg)
    validate(cfg, latents=("student", "hr"), law=LAWS, few=1, rollout=1)
    if cfg.perceptual and cfg.ae_type == "tiny":
        die("--perceptual needs the DINOv2 of a published family, tiny has none")
    rank, _, device = place(cfg.device)
    part, tensors, config, name = methods[method](cfg, device)
    if cfg.export and rank == 0 and name:
        export(Path(cfg.export, part), tensors, config, name)
    elif cfg.export and rank == 0:                                          # the authors' layout
        stored = dict(config=config, model_state_dict=tensors)
        write_whole(Path(cfg.export, part), lambda file: torch.save(stored, file))


if __name__ == "__main__":
    launch(main)
