"""silu(a) * b on the two halves of one product, the activation of the DiT's feed-forward layer.

Plain PyTorch.
"""
import torch.nn.functional as F


def swiglu_reference(ab):
    """ab (..., 2F), the silu argument first -> (..., F)."""
    a, b = ab.chunk(2, dim=-1)
    return F.silu(a) * b


swiglu = swiglu_reference
