"""Softmax attention, fused or as plain products: whichever is faster on the device. Both are exact."""

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_TOKENS = 2048
"""Most keys for plain products where a graph is recorded, since it keeps all scores in memory."""

PLAIN_SCORES = 2**22
"""Most scores in one plain product: beyond that, allocating memory takes as long as the arithmetic."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention.

    In bf16 on CPUs plain products take half the time of torch's fused kernel.

    Args:
        q: Queries `[B, h, T', d]`, T' at most T.
        k: Keys `[B, h, T, d]`.
        v: Values, likewise.

    Returns:
        `[B, h, T', d]`.
    """
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or (graph and k.shape[2] > PLAIN_TOKENS):
        return F.scaled_dot_product_attention(q, k, v)
    heads = max(1, PLAIN_SCORES // (q.shape[2] * k.shape[2]))
    if heads >= q.shape[0] * q.shape[1]:
        return _plain(q, k, v)
    groups = zip(*(x.flatten(0, 1).split(heads) for x in (q, k, v)), strict=True)
    return torch.cat([_plain(*group) for group in groups]).view(q.shape)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
