"""y = rms_norm(x) * weight * (1 + scale) + shift, the input of each half of a DiT block (adaLN).

Plain PyTorch. The statistics are float32 whatever the dtype of x, and the result is cast back before the
multiplication by the gain, as the published networks were trained.
"""
import torch.nn.functional as F


def rms_norm(x, weight, eps=1e-6):
    """x (..., D), weight (D,) -> (..., D) in x.dtype; no mean subtraction, no bias."""
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rms_modulate_reference(x, weight, shift, scale, eps=1e-6):
    """x (B, T, D); weight (D,); shift, scale (B, 1, D) -> (B, T, D)."""
    return rms_norm(x, weight, eps) * (1 + scale) + shift


rms_modulate = rms_modulate_reference
