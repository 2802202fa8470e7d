"""Per-head RMS norm of queries and keys, then 2-D rotary positions on neighbouring pairs, on the packed qkv.

Plain PyTorch. Norm before rotation; v passes through untouched.
"""
import torch

from kernels.norm import rms_norm


def rotate(x, cos, sin):
    """Turn each pair (x_2i, x_2i+1) by its angle. x (B, T, H, d); cos, sin (T, 1, d/2) -> as x."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                       # (B, T, H, d/2) each
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, eps=1e-6):
    """qkv (B, T, 3, H, d); q_weight, k_weight (d,); cos, sin (T, d/2) -> q, k, v (B, T, H, d) each."""
    q, k, v = qkv.unbind(2)
    q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)    # float32 where the gains are
    cos, sin = cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


qk_norm_rope = qk_norm_rope_reference
