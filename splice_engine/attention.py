"""Softmax attention, by whichever exact way is the faster on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_TOKENS = 2048
"""On CPUs plain bf16 products take half the time of torch's fused attention; a graph may hold scores of so many."""

SCORES = 2**22
"""Most scores in one of those products: beyond them, memory that is new each time costs as much as the arithmetic."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of `[B, h, T, d]` each; the queries may be fewer than the keys."""
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or (graph and k.shape[2] > PLAIN_TOKENS):
        return F.scaled_dot_product_attention(q, k, v)
    heads = max(1, SCORES // (q.shape[2] * k.shape[2]))
    if heads >= q.shape[0] * q.shape[1]:
        return _plain(q, k, v)
    groups = zip(*(x.flatten(0, 1).split(heads) for x in (q, k, v)), strict=True)
    return torch.cat([_plain(*group) for group in groups]).view(q.shape)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
