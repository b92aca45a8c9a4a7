"""Softmax attention, by whichever exact way is the faster on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_TOKENS = 2048
"""On CPUs plain bf16 products take half the time of torch's fused attention; up to so many tokens they fit."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of `[B, h, T, d]` each; the queries may be fewer than the keys."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= PLAIN_TOKENS:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
