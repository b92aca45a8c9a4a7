"""What a backbone saw in a picture."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FACETS = ("token", "key", "query", "value")
"""What can be read per token: the block's output, or one of the three projections that its attention works with."""


@dataclass(frozen=True)
class Features:
    """Features of a batch of pictures from one block.

    Attributes:
        cls: `[B, D]`, the [CLS] token as the block's output, before the final norm.
        tokens: `[B, N, D]`, the chosen facet of the patch tokens, row by row over the grid; heads concatenated.
        prefix: `[B, P, D]`, the same facet of the tokens before the patches: [CLS] first, then any registers.
        grid: (h, w) in patches; N = h·w.
        layer: Index of the block, 0 the first.
        facet: One of `FACETS`.
    """

    cls: Tensor
    tokens: Tensor
    prefix: Tensor
    grid: tuple[int, int]
    layer: int
    facet: str


def cosine_similarity_matrix(x: Tensor) -> Tensor:
    """Cosine of each row with each row: `[B, T, D]` to `[B, T, T]`."""
    unit = F.normalize(x, dim=-1, eps=1e-8)
    return unit @ unit.transpose(-2, -1)


def self_similarity(features: Features) -> Tensor:
    """Self-similarity of the [CLS] token and the patches (paper, section 3): how alike each place is to each other one.

    Args:
        features: Of `facet` "key" for the paper's descriptor. Registers are left out.

    Returns:
        `[B, 1+N, 1+N]`, cosines.
    """
    return cosine_similarity_matrix(torch.cat([features.prefix[:, :1], features.tokens], dim=1))
