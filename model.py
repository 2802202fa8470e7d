"""The networks of VOSR, their conditions and guidance, and strict loading (paper Sec. 3.1-3.3).

Read `DiT.forward` (the paper's Fig. 2) and `guided_velocity` (Eq. 2) first; then the autoencoders, the
semantic encoders, and `VOSR`, the bundle that every other stage uses. Parameter names and layouts are those
of the published files. One class per network: a size is data.
"""
import json
import math
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.norm import rms_modulate, rms_norm
from kernels.qk import qk_norm_rope
from kernels.swiglu import swiglu

LATENT_CHANNELS = {"tiny": 16, "sd2": 4, "qwen": 16}  # per autoencoder; all reduce the side by 8
GRID = 16  # pixels per image token: 8 (autoencoder) x 2 (patch); image sides must be multiples of it


@dataclass
class ModelConfig:
    """Shape of one DiT and of the networks around it; field names as in the published args.json."""

    dim: int = 1024  # width D of the transformer
    depth: int = 28  # number of blocks
    num_heads: int = 16  # attention heads; 64 channels each in the published sizes
    patch_size: int = 2  # latent cells per token side
    mlp_ratio: float = 4.0  # SwiGLU width is int(2/3 * dim * mlp_ratio)
    enc_dim: int = 768  # channels of a semantic token
    encdim_ratio: int = 3  # hidden width of the semantic projection, in units of dim
    resolution: int = 512  # native side in pixels: rotary positions of other sizes are scaled to its grid
    ae_type: str = "sd2"  # autoencoder: tiny, sd2 or qwen
    dinov2_size: int = 448  # side in pixels of what the DINOv2 encoder sees
    layer_dinov2b_list: tuple = (8,)  # DINOv2 block, counted from 0, whose tokens are the semantics
    semantics: bool = True  # False: trained without a semantic encoder, the first row of Table 6
    auxiliary_time_cond: bool = False  # one-step network: has the embedder of the target time r


# ---------------------------------------------------------------- diffusion transformer (Sec. 3.2, Fig. 2)
# nn.RMSNorm only holds the gains here; kernels.norm has the formula.
class TimeEmbedder(nn.Module):
    """s (B,) in [0, 1], used as it is (not times 1000) -> (B, D). Cosines first."""
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, s):
        frequencies = torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=s.device))
        angles = s.float()[:, None] * frequencies                                     # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a table first made while sampling must serve training too
def rope_table(height, width, native, head_dim, device):
    """Rotary angles of a height x width token grid: cos, sin (height * width, head_dim / 2), row-major.

    First half of the pairs turns with the row, second half with the column. Each axis is stretched or
    squeezed to the native extent, so sizes other than the training size see positions they know."""
    count = partial(torch.arange, dtype=torch.float64, device="cpu")                  # mps has no float64
    frequencies = 10_000 ** (-count(head_dim // 4) / (head_dim // 4))
    rows, cols = (count(n) / n * native for n in (height, width))
    angles = torch.cat([(rows[:, None] * frequencies)[:, None].expand(-1, width, -1),
                        (cols[:, None] * frequencies)[None].expand(height, -1, -1)], dim=-1).flatten(0, 1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class RopeBuffers(nn.Module):
    """The native table as published files store it, every entry twice; kept so that files load both ways."""
    def __init__(self, native, head_dim):
        super().__init__()
        cos, sin = rope_table(native, native, native, head_dim, torch.device("cpu"))
        self.register_buffer("freqs_cos", cos.repeat_interleave(2, -1))
        self.register_buffer("freqs_sin", sin.repeat_interleave(2, -1))


class Attention(nn.Module):
    """Self-attention over image tokens with normed queries and keys and rotary positions."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                          # (B, T, 3, H, d)
        q, k, v = qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, *rope)    # (B, T, H, d) each
        return self.proj(attention(q, k, v))                                          # (B, T, D)


class CrossAttention(nn.Module):
    """Image tokens look at the semantic tokens; no positions (Sec. 3.2)."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_linear, self.k_linear, self.v_linear, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)

    def prepare(self, s, empty=None):
        """s (B, N, D) -> keys, values (B, N, H, d), and what every query finds in the one token `empty`."""
        k, v = (f(s).unflatten(-1, (self.heads, -1)) for f in (self.k_linear, self.v_linear))
        nothing = None if empty is None else self.proj(self.v_linear(empty))
        return rms_norm(k, self.k_norm.weight), v, nothing

    def forward(self, x, s):
        """x (B, T, D); s (B, N, D), or what `prepare` made of the first samples: the others are empty."""
        k, v, nothing = s if isinstance(s, tuple) else self.prepare(s)
        q = self.q_linear(x[:len(k)]).unflatten(-1, (self.heads, -1))                 # (B, T, H, d)
        y = self.proj(attention(rms_norm(q, self.q_norm.weight), k, v))
        return y if len(y) == len(x) else torch.cat([y, nothing.expand(len(x) - len(y), *y.shape[1:])])


class SwiGLU(nn.Module):
    def __init__(self, dim, ratio):
        super().__init__()
        width = int(2 / 3 * int(dim * ratio))   # in floating point, not rounded to a multiple: 1024 -> 2730
        self.w12, self.w3 = nn.Linear(dim, 2 * width), nn.Linear(width, dim)

    def forward(self, x):
        return self.w3(swiglu(self.w12(x)))


class Block(nn.Module):
    """Self-attention, cross-attention to the semantic tokens, SwiGLU (paper Sec. 3.2).

    Time enters self-attention and SwiGLU as shift, scale and gate; cross-attention has no norm and no gate.
    """
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(cfg.dim), nn.RMSNorm(cfg.dim)
        self.attn = Attention(cfg.dim, cfg.num_heads)
        self.cross_attn = CrossAttention(cfg.dim, cfg.num_heads)
        self.mlp = SwiGLU(cfg.dim, cfg.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, cfg.dim) / cfg.dim**0.5)

    def forward(self, x, time, s, rope):
        """x (B, T, D), time (B, 6, D), s: see CrossAttention, rope: two (T, d/2) tables -> (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + time).chunk(6, dim=1)
        x = x + gate1 * self.attn(rms_modulate(x, self.norm1.weight, shift1, scale1), rope)
        x = x + self.cross_attn(x, s)
        return x + gate2 * self.mlp(rms_modulate(x, self.norm2.weight, shift2, scale2))


class PatchEmbed(nn.Module):
    def __init__(self, channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x):
        """As a product, since a GPU rounds convolutions to TF32: (B, C, h p, w p) -> (B, h w, D)."""
        x = F.pixel_unshuffle(x, self.proj.stride[0]).flatten(2).mT                   # (B, T, C p p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final, self.linear = nn.RMSNorm(dim), nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, shift, scale):
        return self.linear(rms_modulate(x, self.norm_final.weight, shift, scale))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, out, gelu="none"):
        super().__init__()
        self.fc1, self.fc2, self.gelu = nn.Linear(dim, hidden), nn.Linear(hidden, out), gelu

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class DiT(nn.Module):
    """Velocity v_theta(z_t, t, kappa); with auxiliary_time_cond the student f_theta(z_t, t, r, kappa).

    The LightningDiT of the published models. Its output is zero at initialisation."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.channels, self.recompute = cfg, LATENT_CHANNELS[cfg.ae_type], False
        self.native = cfg.resolution // 8 // cfg.patch_size                           # tokens per side
        self.x_embedder = PatchEmbed(2 * self.channels, cfg.dim, cfg.patch_size)
        self.t_embedder = TimeEmbedder(cfg.dim)
        if cfg.auxiliary_time_cond:
            self.r_embedder = TimeEmbedder(cfg.dim)
        self.feat_rope = RopeBuffers(self.native, cfg.dim // cfg.num_heads)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.layer_norm = nn.LayerNorm(cfg.enc_dim)
        self.mlp_ca = Mlp(cfg.enc_dim, cfg.dim * cfg.encdim_ratio, cfg.dim, gelu="tanh")
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(cfg.dim, cfg.patch_size**2 * self.channels)
        self.init_weights()

    def init_weights(self):
        """Linear: Xavier uniform, bias 0. Time: normal 0.02. Last modulation and projection: 0, so v = 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        embedders = [self.t_embedder] + ([self.r_embedder] if self.cfg.auxiliary_time_cond else [])
        for linear in (self.t_block[1], *(m.mlp[i] for m in embedders for i in (0, 2))):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    def semantics(self, c_sem):
        """c_sem (B, N, enc_dim) -> what the blocks need of it, for many calls of forward with the same."""
        s, empty = (self.mlp_ca(self.layer_norm(x)) for x in (c_sem, torch.zeros_like(c_sem[:1, :1])))
        return [block.cross_attn.prepare(s, empty) for block in self.blocks]

    def forward(self, z_t, t, c_str, c_sem, r=None):
        """z_t, c_str (B, C, h, w); t, r (B,) in [0, 1], r <= t; c_sem (B, N, enc_dim) -> v (B, C, h, w).

        h and w are multiples of the patch, equal or not. Zero c_sem means "no semantics": it still passes
        the projection, whose biases make it a learned constant. c_sem may be the `semantics` of the first
        samples, the others have none then. Raises ValueError for other sides, or r missing or not wanted."""
        p, (height, width) = self.cfg.patch_size, (n // self.cfg.patch_size for n in z_t.shape[-2:])
        if z_t.shape[-2:] != (height * p, width * p):
            raise ValueError(f"latent sides must be multiples of {p}, got {tuple(z_t.shape[-2:])}")
        if (r is not None) != self.cfg.auxiliary_time_cond:
            raise ValueError("a one-step network needs the target time r, a multi-step network has none")
        exact = torch.autocast("cpu" if z_t.is_meta else z_t.device.type, enabled=False)
        with exact:                                                             # latents, time, v in float32
            c = self.t_embedder(t)                                                    # (B, D)
            if r is not None:
                c = c + self.r_embedder(r) * (t - r)[:, None].to(c.dtype)             # vanishes at r = t
            time = self.t_block(c).unflatten(-1, (6, -1))                             # (B, 6, D), all blocks
            last = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)     # (B, 1, D), twice
            x = self.x_embedder(torch.cat([c_str, z_t], dim=1).to(time.dtype))        # (B, T, D)
        memory = (c_sem if isinstance(c_sem, list) else                               # per block, or
                  [self.mlp_ca(self.layer_norm(c_sem))] * self.cfg.depth)             # (B, N, D) for all
        rope = rope_table(height, width, self.native, self.cfg.dim // self.cfg.num_heads, z_t.device)

        for block, s in zip(self.blocks, memory, strict=True):
            x = (checkpoint(block, x, time, s, rope, use_reentrant=False) if self.recompute and self.training
                 else block(x, time, s, rope))
        with exact:
            x = self.final_layer(x, *last).unflatten(-1, (p, p, -1))                  # (B, T, p, p, C)
        x = x.unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4)                 # (B, C, h/p, p, w/p, p)
        return x.flatten(4, 5).flatten(2, 3)


def per_sample(x):
    """(B,) -> (B, 1, 1, 1); a plain number stays what it is."""
    return x.view(-1, 1, 1, 1) if torch.is_tensor(x) else x


def partial_condition(c_str, c_sem, alpha):
    """kappa = (alpha c_str, no semantics), the weakly anchored branch of Sec. 3.3.

    c_str (B, C, h, w), c_sem (B, N, enc_dim) or DiT.semantics, alpha a float or (B, 1, 1, 1)."""
    return alpha * c_str, None if isinstance(c_sem, list) else torch.zeros_like(c_sem)


def both_branches(net, z, t, full, weak):
    """v_cond and v_pcond of Sec. 3.3 as one batch; full and weak are pairs (c_str, c_sem). float32."""
    c_sem = full[1] if weak[1] is None else torch.cat([full[1], weak[1]])
    return net(torch.cat([z, z]), torch.cat([t, t]), torch.cat([full[0], weak[0]]), c_sem).float().chunk(2)


def guided_velocity(net, z, t, c_str, c_sem, alpha, cfg_scale):
    """Restoration-oriented guidance, paper Eq. 2: v_cfg = v_pcond + s (v_cond - v_pcond).

    cfg_scale 0 is the partial branch (invents), 1 the full branch (obeys the input).
    z, c_str (B, C, h, w), t (B,), c_sem (B, N, enc_dim) or DiT.semantics of it -> (B, C, h, w) in float32."""
    v_cond, v_pcond = both_branches(net, z, t, (c_str, c_sem), partial_condition(c_str, c_sem, alpha))
    return v_pcond + cfg_scale * (v_cond - v_pcond)


# ---------------------------------------------------------------- autoencoders: image <-> latent
# Interface of all three: encode(image, noise) -> normalised latent; decode(latent) -> image, not clamped.
conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)


def chain(**modules):
    """One module after the other, under the names of the published files."""
    return nn.Sequential(OrderedDict(modules))


def group_norm(channels, groups=32):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ChannelNorm(nn.Module):
    """Qwen: unit length over channels, times sqrt(channels) and a gain; no bias."""
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1, eps=1e-12) * len(self.gamma) ** 0.5 * self.gamma


class ResBlock(nn.Module):
    def __init__(self, cin, cout, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), conv3(cin, cout)
        self.norm2, self.conv2 = norm(cout), conv3(cout, cout)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class PixelAttention(nn.Module):
    """Stable Diffusion: one head over all pixels."""
    def __init__(self, channels, norm):
        super().__init__()
        self.group_norm = norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)                        # (B, h w, C)
        q, k, v = (f(tokens)[:, :, None] for f in (self.to_q, self.to_k, self.to_v))  # one head
        return x + self.to_out[0](attention(q, k, v)).transpose(1, 2).reshape(x.shape)


class QwenAttention(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm(channels)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, :, None].chunk(3, dim=-1)
        return x + self.proj(attention(q, k, v).transpose(1, 2).reshape(x.shape))


class MidBlock(nn.Module):
    def __init__(self, channels, norm, attn):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, norm) for _ in range(2))
        self.attentions = nn.ModuleList([attn(channels, norm)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def level(widths, norm, **resample):
    """Residual blocks of one resolution, then (not at the last level) a change of resolution."""
    return chain(resnets=nn.Sequential(*(ResBlock(a, b, norm) for a, b in pairwise(widths))),
                 **{name: nn.Sequential(module) for name, module in resample.items()})


def downsample(c):
    """Halve the side: one zero column right, one zero row below, 3x3 convolution with stride 2."""
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))


def upsample(c, out):
    return chain(up=nn.Upsample(scale_factor=2.0), conv=conv3(c, out))


def sd_encoder(channels, layers, latent, norm=group_norm):
    """SD2.1: image (B, 3, H, W) -> moments (B, 2 latent, H/8, W/8) before quant_conv."""
    last, levels = channels[-1], []
    for i, (a, b) in enumerate(pairwise([channels[0], *channels])):
        down = {"downsamplers": downsample(b)} if i < len(channels) - 1 else {}
        levels.append(level([a] + [b] * layers, norm, **down))
    return chain(conv_in=conv3(3, channels[0]), down_blocks=nn.Sequential(*levels),
                 mid_block=MidBlock(last, norm, PixelAttention), conv_norm_out=norm(last), silu=nn.SiLU(),
                 conv_out=conv3(last, 2 * latent))


def sd_decoder(channels, layers, latent, norm=group_norm):
    """SD2.1: latent (B, latent, h, w) -> image (B, 3, 8h, 8w). Narrow channels: the light one (Sec. 4.1)."""
    first, last, levels = channels[-1], channels[0], []
    for i, (a, b) in enumerate(pairwise([first, *channels[::-1]])):
        up = {"upsamplers": upsample(b, b)} if i < len(channels) - 1 else {}
        levels.append(level([a] + [b] * (layers + 1), norm, **up))
    return chain(conv_in=conv3(latent, first), mid_block=MidBlock(first, norm, PixelAttention),
                 up_blocks=nn.Sequential(*levels), conv_norm_out=norm(last), silu=nn.SiLU(),
                 conv_out=conv3(last, 3))


class AutoencoderKL(nn.Module):
    """SD2.1 autoencoder, 4 channels, f8; load_vae can put the light decoder into it."""
    def __init__(self, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                 norm_num_groups=32, scaling_factor=0.18215):
        super().__init__()
        self.scaling_factor, norm = scaling_factor, partial(group_norm, groups=norm_num_groups)
        self.encoder = sd_encoder(block_out_channels, layers_per_block, latent_channels, norm)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.decoder = sd_decoder(block_out_channels, layers_per_block, latent_channels, norm)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def moments(self, image):
        """image (B, 3, H, W) in [-1, 1] -> mean, logvar (B, C, H/8, W/8) of the posterior."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image, noise=None):
        mean, logvar = self.moments(image)
        return (mean if noise is None else mean + torch.exp(logvar / 2) * noise) * self.scaling_factor

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z / self.scaling_factor))


def qwen_encoder(base, mult, layers, latent):
    widths, blocks = [base] + [base * m for m in mult], []
    for i, (a, b) in enumerate(pairwise(widths)):
        blocks += [ResBlock(a if j == 0 else b, b, ChannelNorm) for j in range(layers)]
        blocks += [chain(resample=nn.Sequential(*downsample(b)))] if i < len(mult) - 1 else []
    return chain(conv_in=conv3(3, base), down_blocks=nn.Sequential(*blocks),
                 mid_block=MidBlock(b, ChannelNorm, QwenAttention), norm_out=ChannelNorm(b), silu=nn.SiLU(),
                 conv_out=conv3(b, 2 * latent))


def qwen_decoder(base, mult, layers, latent):
    widths, levels = [base * m for m in reversed(mult)], []
    for i, c in enumerate(widths):
        entry = widths[i - 1] // 2 if i else c  # upsampling halves the channels
        up = {"upsamplers": chain(resample=nn.Sequential(*upsample(c, c // 2)))} if i < len(mult) - 1 else {}
        levels.append(level([entry] + [c] * (layers + 1), ChannelNorm, **up))
    return chain(conv_in=conv3(latent, widths[0]), mid_block=MidBlock(widths[0], ChannelNorm, QwenAttention),
                 up_blocks=nn.Sequential(*levels), norm_out=ChannelNorm(c), silu=nn.SiLU(),
                 conv_out=conv3(c, 3))


class QwenVAE(nn.Module):
    """Qwen-Image autoencoder for single pictures, 16 channels, f8 (used by the 1.4B models)."""
    def __init__(self, latents_mean, latents_std, base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4),
                 num_res_blocks=2):
        super().__init__()
        self.encoder = qwen_encoder(base_dim, dim_mult, num_res_blocks, z_dim)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z_dim, 2 * z_dim, 1), nn.Conv2d(z_dim, z_dim, 1)
        self.decoder = qwen_decoder(base_dim, dim_mult, num_res_blocks, z_dim)
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            value = torch.tensor(values, device="cpu").view(1, z_dim, 1, 1)  # real also in a network on meta
            self.register_buffer(name, value, persistent=False)

    moments = AutoencoderKL.moments

    def encode(self, image, noise=None):
        mean, logvar = self.moments(image)
        z = mean if noise is None else mean + torch.exp(logvar / 2) * noise
        return (z - self.latents_mean) / self.latents_std

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z * self.latents_std + self.latents_mean)).clamp(-1, 1)


class TinyRes(nn.Module):
    """No norms: at full resolution they cost a laptop more than the convolutions."""
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = conv3(channels, channels), conv3(channels, channels)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class TinyAutoencoder(nn.Module):
    """Own small autoencoder, 16 channels, f8, deterministic; trained by `distill.py --method autoencoder`.

    latents_mean, latents_std (1, 16, 1, 1) normalise the latent; training measures them."""
    def __init__(self, latent_channels=16, widths=(64, 96), decoder_widths=None):
        super().__init__()
        (a, b), (c, d) = widths, decoder_widths or widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), conv3(48, a), TinyRes(a), TinyRes(a),                              # 1/4
            nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1), TinyRes(b), conv3(b, latent_channels))     # 1/8
        self.decoder = nn.Sequential(
            conv3(latent_channels, d), TinyRes(d), nn.Conv2d(d, 4 * c, 1),                           # 1/8
            nn.PixelShuffle(2), TinyRes(c), TinyRes(c), nn.Conv2d(c, 2 * c, 1),                      # 1/4
            nn.PixelShuffle(2), TinyRes(c // 2), conv3(c // 2, 12), nn.PixelShuffle(2))
        self.register_buffer("latents_mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("latents_std", torch.ones(1, latent_channels, 1, 1))

    def encode(self, image, noise=None):
        """There is no posterior, so `noise` has nothing to scale."""
        return (self.encoder(image) - self.latents_mean) / self.latents_std

    def decode(self, z):
        return self.decoder(z * self.latents_std + self.latents_mean)


# ---------------------------------------------------------------- semantic encoders: image -> c_sem
class ViTAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(attention(*self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)))


class ViTBlock(nn.Module):
    def __init__(self, dim, heads, ratio):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(dim)}) for _ in range(2))
        self.attn, self.mlp = ViTAttention(dim, heads), Mlp(dim, int(dim * ratio), dim)

    def forward(self, x):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


class DINOv2(nn.Module):
    """Vision encoder of the published models; `layer` is the block, counted from 0, whose tokens are used."""
    def __init__(self, embed_dim=768, depth=12, num_heads=12, patch_size=14, mlp_ratio=4, img_size=518,
                 layer=8, size=448):
        super().__init__()
        self.layer, self.size, self.patch_size, self.grid = layer, size, patch_size, img_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))                     # in files, never used
        self.patch_embed = PatchEmbed(3, embed_dim, patch_size)
        self.blocks = nn.ModuleList(ViTBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def preprocess(self, image):
        """image (B, 3, H, W) in [-1, 1] -> (B, 3, size, size), ImageNet statistics; never antialiased."""
        x = image.float() * 0.5 + 0.5
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False).clamp(0, 1)
        mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
        return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def positions(self, height, width):
        """(1, 1 + height width, D): the grid part resized bicubically, with the scale factors of DINOv2."""
        if height == width == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)               # 0.1 is DINOv2's own
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([self.pos_embed[:, :1], grid.to(self.pos_embed.dtype)], dim=1)

    def features(self, x, layer):
        """x (B, 3, h, w) preprocessed, sides multiples of 14 -> tokens after block `layer` (B, N, D).

        The final norm applies after the last block only; later blocks are not run."""
        height, width = (n // self.patch_size for n in x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        x = x + self.positions(height, width)
        for block in self.blocks[:layer + 1]:
            x = block(x)
        return (self.norm(x) if layer == len(self.blocks) - 1 else x)[:, 1:]

    def forward(self, image):
        return self.features(self.preprocess(image).to(self.pos_embed.dtype), self.layer)


class TinySemanticEncoder(nn.Module):
    """Own small encoder: a token per 32 x 32 pixels of the enlarged LR image. It learns with the DiT."""
    def __init__(self, enc_dim=96):
        super().__init__()
        widths = (3, 32, 64, enc_dim)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                   for a, b in pairwise(widths))
        self.mix = conv3(enc_dim, enc_dim)

    def forward(self, image):
        x = F.avg_pool2d(image, 4)                                                    # about the LR size
        for conv in self.convs:
            x = F.silu(conv(x))
        return self.mix(x).flatten(2).transpose(1, 2)                                 # (B, N, enc_dim)


class NoSemantics(nn.Module):
    """In place of an encoder where a network was trained without one: zeros mean "no semantics"."""
    def __init__(self, enc_dim):
        super().__init__()
        self.enc_dim = enc_dim

    def forward(self, image):
        return image.new_zeros(len(image), 1, self.enc_dim)                           # (B, N, enc_dim)


# ---------------------------------------------------------------- the bundle
class VOSR(nn.Module):
    """DiT + autoencoder + semantic encoder, with the four operations that the stages need.

    encode: image (B, 3, H, W) in [-1, 1], sides multiples of 8 -> latent (B, C, H/8, W/8) of unit scale, the
    mode of the posterior, or, given Gaussian noise of that shape, a sample of it. decode: latent -> image in
    about [-1, 1], not clamped. semantic_tokens: enlarged LR image -> c_sem (B, N, enc_dim)."""
    def __init__(self, dit, vae, semantic_encoder):
        super().__init__()
        self.dit, self.vae, self.semantic_encoder = dit, vae, semantic_encoder

    def encode(self, image, noise=None):
        return self.vae.encode(image, noise)

    def decode(self, z):
        return self.vae.decode(z)

    def semantic_tokens(self, image):
        return self.semantic_encoder(image)

    def velocity(self, z_t, t, c_str, c_sem, r=None):
        return self.dit(z_t, t, c_str, c_sem, r)


def choose_device(name):
    """auto: cuda, mps, cpu in that order; else the named device, or ValueError where it is not there."""
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cuda"] * bool(cards) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name not in ("auto", *there, *cards):
        raise ValueError(f"device {name!r} is not available here; {' and '.join(there)} would work")
    return torch.device(there[0] if name == "auto" else name)


# ---------------------------------------------------------------- loading: all names and shapes, or an error
def read_json(path):
    """Dict of a JSON file."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON settings ({error})") from None


def read_tensors(path):
    """Views of a mapped .safetensors file, or .pth file by the restricted unpickler: no code runs."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except UnpicklingError:
        raise ValueError(f"{path} cannot be read: it is damaged or holds code, which is never run") from None
    except (OSError, RuntimeError, SafetensorError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {(str(error) or 'it is empty').splitlines()[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path} holds no named tensors")
    return tensors


PREFIXES = ("module.", "_orig_mod.", "ema_model.")  # left by DDP, torch.compile, EMA wrappers, even nested


def load_strict(net, tensors, source, network="this network"):
    """Copy `tensors` into `net`; one on meta takes them, in its dtypes. ValueError names the first misfit."""
    for prefix in 3 * PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    want = net.state_dict()
    rope = {name for name in want if name.startswith("feat_rope.")}  # tables that can be recomputed
    known = {n for n, v in tensors.items() if n in want and torch.is_tensor(v) and v.is_floating_point()}
    shapes = {n for n in known if want[n].shape != tensors[n].shape}
    tables = {n for n in known & rope - shapes if (want[n].cpu() - tensors[n]).abs().max() > 0.01}
    for what, names in (("lacks", want.keys() - tensors.keys() - rope),
                        ("has the unknown", tensors.keys() - known), ("has another shape of", shapes),
                        ("was trained with other positions than", tables)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{source} {what} {min(names)}{more}: not the weights of {network}")
    tensors = {name: tensors.get(name, value).to(value.dtype) for name, value in want.items()}
    net.load_state_dict(tensors, assign=any(p.is_meta for p in net.parameters()))
    return net


def build(make, source):
    """make() on the meta device: no time and memory for initial values that are overwritten."""
    try:
        with torch.device("meta"):
            return make()
    except (TypeError, ValueError, LookupError, NameError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{source} describes no network: {str(error).splitlines()[0]}") from None


def halve(net, dtype):
    """A DiT's products in half precision, for autocast; norms, time, first and last layer stay float32."""
    for name, module in net.named_modules() if dtype else ():
        if isinstance(module, nn.Linear) and name.startswith(("blocks.", "mlp_ca.")):
            module.to(dtype)
    return net


def model_folder(path):
    """The folder that a path means: OUT and OUT/last mean the newest checkpoint, which OUT/last names."""
    path = Path(path, "last") if Path(path, "last").is_file() else Path(path)
    return path.parent / path.read_text().strip() if path.is_file() and path.name == "last" else path


def find_weights(folder):
    """The weights file of a model folder, where the published layouts and our runs keep it."""
    folder = model_folder(folder)
    for sub in ("clean_weights", "checkpoints", "."):
        for name in ("ema_model.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors"):
            if (folder / sub / name).is_file():
                return folder / sub / name
    raise ValueError(f"{folder} has no ema_model.safetensors or model.safetensors")


def read_settings(folder):
    """Path and content of args.json, in the model folder or, as in the official scripts, up to four above."""
    folder = model_folder(folder)
    for place in (folder, *folder.absolute().parents[:4]):
        if (place / "args.json").is_file():
            return place / "args.json", read_json(place / "args.json")
    raise ValueError(f"{folder} has no args.json")


def read_config(args, source):
    """ModelConfig from a dict that may hold more."""
    if missing := {"dim", "depth", "num_heads"} - args.keys():
        raise ValueError(f"{source} has no {min(missing)}: not the args.json of a DiT")
    if off := [n for n in ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm") if not args.get(n, True)]:
        raise ValueError(f"{source} switches {off[0]} off: no published network does, and this code cannot")
    known = {name: type(like) for name, like in asdict(ModelConfig()).items() if name in args}
    try:
        cfg = ModelConfig(**{name: kind(args[name]) for name, kind in known.items()})
        if wrong := [n for n, v in vars(cfg).items() if type(v) is int and (v != args.get(n, v) or v < 1)]:
            raise ValueError(f"{wrong[0]} {args.get(wrong[0])}")
        return cfg
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{source} has a value of the wrong kind: {error}") from None


OFFICIAL = dict(alpha="weak_cond_strength_aelq_list", init="pretrained_ckpt", teacher="teacher_ckpt",
                omega="cfg_scale", delta="rcgm_delta_t", rollout="rcgm_n_steps", method="distill_type")


def settings(cfg, paths=True):
    """Content of args.json: settings, also by official names. paths False: without places on this machine."""
    stored = asdict(cfg)
    for name in () if paths else ("data", "out", "weights", "init", "export", "teacher", "device"):
        stored.pop(name, None)
    fixed = dict(use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True, wo_shift=False)
    return stored | {theirs: stored[ours] for ours, theirs in OFFICIAL.items() if ours in stored} | fixed


def load_dit(folder, half=None):
    """DiT of a folder, if tensors and args.json agree (it may be silent on r_embedder); half: see halve."""
    source, (path, args) = find_weights(folder), read_settings(folder)
    tensors = {n: v for n, v in read_tensors(source).items() if BESIDE not in n}
    cfg = read_config(args | {"auxiliary_time_cond": any("r_embedder." in name for name in tensors)}, path)
    if args.get("auxiliary_time_cond") not in (None, cfg.auxiliary_time_cond):
        raise ValueError(f"{source} {'has' if cfg.auxiliary_time_cond else 'lacks'} r_embedder, "
                         f"against auxiliary_time_cond in {path}")
    return load_strict(build(lambda: halve(DiT(cfg), half), path), tensors, source, f"the network in {path}")


def start_from(folder, net):
    """--init: weights of a model folder into net; the tiny encoder may lie beside it, as in weights/tiny."""
    path, wanted = find_weights(folder), net.state_dict()
    tensors = read_tensors(path)
    if any(name.startswith(BESIDE) for name in wanted.keys() - tensors.keys()):
        beside = read_tensors(find_weights(model_folder(folder).parent / "semantic"))
        tensors |= {BESIDE + name: value for name, value in beside.items()}
    load_strict(net, {n: v for n, v in tensors.items() if "feat_rope." not in n}, path)  # of any size


def rename_attention(tensors):
    """Older Stable Diffusion files call the four projections of the pixel attention otherwise."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        old, new = f".attentions.0.{old}.", f".attentions.0.{new}."
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return tensors


AUTOENCODERS = {  # per ae_type: class, and fields of config.json that it takes; the first tells them apart
    "sd2": (AutoencoderKL, ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
                            "scaling_factor")),
    "qwen": (QwenVAE, ("base_dim", "latents_mean", "latents_std", "z_dim", "dim_mult", "num_res_blocks")),
    "tiny": (TinyAutoencoder, ("widths", "latent_channels", "decoder_widths"))}


def load_vae(folder, light_decoder=None, ae_type=None):
    """Autoencoder of a folder; light_decoder: a torch file with the one that replaces SD2.1's."""
    path, source = Path(folder) / "config.json", find_weights(folder)
    config = read_json(path)
    kind = next((kind for kind, (_, names) in AUTOENCODERS.items() if names[0] in config), "none")
    if kind != (ae_type or kind) or kind == "none":
        raise ValueError(f"{path} is not the configuration of the {ae_type or 'VOSR'} autoencoder")
    cls, names = AUTOENCODERS[kind]
    vae = build(lambda: cls(**{name: config[name] for name in names if name in config}), path)
    load_strict(vae, rename_attention(read_tensors(source)), source, f"the autoencoder in {path}")
    if light_decoder:
        stored = read_tensors(light_decoder)
        if not all(isinstance(stored.get(part), dict) for part in ("config", "model_state_dict")):
            raise ValueError(f"{light_decoder} lacks config or model_state_dict: not the light decoder")
        shape = ("block_out_channels", "layers_per_block", "in_channels")
        decoder = build(lambda: sd_decoder(*(stored["config"][n] for n in shape)), light_decoder)
        vae.decoder = load_strict(decoder, stored["model_state_dict"], light_decoder)
        vae.post_quant_conv = nn.Identity()
    with torch.no_grad(), suppress(RuntimeError, TypeError):
        z = vae.encode(torch.zeros(1, 3, 32, 32))
        if z.shape == (1, LATENT_CHANNELS[kind], 4, 4) and vae.decode(z).shape == (1, 3, 32, 32):
            return vae
    raise ValueError(f"{light_decoder or path} makes other latents than the DiT of VOSR wants")


BESIDE = "semantic_encoder."  # names of the tiny encoder in a run of train.py, beside its DiT
FROZEN = {  # per autoencoder type: where the parts that DiT training leaves alone are, in the weights folder
    "tiny": ("tiny/vae", "tiny/semantic"),
    "sd2": ("stable-diffusion-2-1-base/vae", "torch_cache/checkpoints/dinov2_vitb14_pretrain.pth"),
    "qwen": ("Qwen-Image-vae-2d", "torch_cache/checkpoints/dinov2_vitl14_pretrain.pth"),
}


def frozen_paths(cfg, weights):
    """Paths of the autoencoder and of the semantic encoder that belong to a DiT of this configuration."""
    return tuple(Path(weights, path) for path in FROZEN[cfg.ae_type])


def load_semantic_encoder(path, cfg):
    """DINOv2 from its .pth file (the size is read off the tensors), the tiny one from a folder, or none."""
    if not cfg.semantics:
        return NoSemantics(cfg.enc_dim)
    path = model_folder(path)
    if path.is_dir():
        source = find_weights(path)
        tensors = read_tensors(source)
        beside = {n[len(BESIDE):]: value for n, value in tensors.items() if n.startswith(BESIDE)}
        return load_strict(TinySemanticEncoder(cfg.enc_dim), beside or tensors, source)
    tensors = read_tensors(path)
    if not torch.is_tensor(tensors.get("cls_token")) or tensors["cls_token"].dim() != 3:
        raise ValueError(f"{path} lacks cls_token: not the weights of DINOv2")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    dim, (layer,) = tensors["cls_token"].shape[-1], cfg.layer_dinov2b_list[-1:] or (None,)
    if dim != cfg.enc_dim or layer not in list(range(depth)):
        raise ValueError(f"{path} has {depth} blocks of {dim} channels: the DiT wants number {layer} "
                         f"with {cfg.enc_dim} channels")
    encoder = build(lambda: DINOv2(dim, depth, dim // 64, layer=layer, size=cfg.dinov2_size), path)
    return load_strict(encoder, tensors, path)


def load_frozen(cfg, weights, folder=None, light=False, semantic=True):
    """(autoencoder, semantic encoder or None) around the DiT in `folder`; light: with the light decoder."""
    vae, encoder = frozen_paths(cfg, weights)
    needed = (vae, encoder) if semantic and cfg.semantics else (vae,)
    if missing := [str(path) for path in needed if not path.exists()]:
        raise ValueError(f"missing: {', '.join(missing)}; see the README, --weights names another folder")
    if cfg.ae_type == "tiny" and folder:
        kept = any(name.startswith(BESIDE) for name in read_tensors(find_weights(folder)))
        encoder = folder if kept else encoder
    decoder = Path(weights, "sd21_lwdecoder.pth") if light and cfg.ae_type == "sd2" else None
    return load_vae(vae, decoder, cfg.ae_type), load_semantic_encoder(encoder, cfg) if semantic else None
