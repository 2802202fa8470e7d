"""softmax(q k^T / sqrt(d)) v over all tokens, no mask; self-attention and cross-attention.

Plain PyTorch: its scaled_dot_product_attention, which picks the best kernel of the device.
"""
import torch.nn.functional as F


def attention_reference(q, k, v):
    """q (B, T, H, d); k, v (B, N, H, d) -> (B, T, H d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                 # (B, H, T or N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


attention = attention_reference
