"""Features that a backbone extracts from pictures: self-similarity and blends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError
from ..mixing import to_shares

FACETS = ("token", "key", "query", "value")
"""What is extracted per token: the block's output, or one of the three projections of its attention."""


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
        backbone: Name of the ViT.
    """

    cls: Tensor
    tokens: Tensor
    prefix: Tensor
    grid: tuple[int, int]
    layer: int
    facet: str
    backbone: str


@dataclass(frozen=True)
class SelfSimilarity:
    """The self-similarity of a picture, with what it was computed of: a fixed target of the structure term.

    Attributes:
        matrix: `[B, 1+N, 1+N]`, cosines.
        grid: (h, w) in patches; N = h·w.
        layer: Index of the block, 0 the first.
        facet: What is compared, one of `FACETS`.
        backbone: Name of the ViT.
    """

    matrix: Tensor
    grid: tuple[int, int]
    layer: int
    facet: str
    backbone: str

    @classmethod
    def of(cls, features: Features) -> "SelfSimilarity":
        """That of some features; raises as `self_similarity` does."""
        return cls(self_similarity(features), features.grid, features.layer, features.facet, features.backbone)


def join(features: Sequence[Features]) -> Features:
    """Features of several batches of pictures, extracted in the same way, as those of one batch."""
    cls, tokens, prefix = (torch.cat([getattr(f, name) for f in features]) for name in ("cls", "tokens", "prefix"))
    return replace(features[0], cls=cls, tokens=tokens, prefix=prefix)


def cosine_similarity_matrix(x: Tensor) -> Tensor:
    """Cosine similarity of all pairs of tokens: `[B, T, D]` to `[B, T, T]`."""
    unit = F.normalize(x, dim=-1, eps=1e-8)
    return unit @ unit.transpose(-2, -1)


def self_similarity(features: Features) -> Tensor:
    """Cosine similarity of all pairs among the [CLS] token and the patches (paper, section 3).

    Args:
        features: Of `facet` "key" for the paper's descriptor. Registers are left out.

    Returns:
        `[B, 1+N, 1+N]`, cosines.

    Raises:
        SpliceError: The features are a blend of pictures whose grids differ, so that there are no patches.
    """
    if not features.tokens.shape[1]:
        raise SpliceError(
            "these features blend pictures of different shapes and hold no patches: crop them to one shape"
        )
    return cosine_similarity_matrix(torch.cat([features.prefix[:, :1], features.tokens], dim=1))


def blend(features: Sequence[Features], weights: Sequence[float]) -> Features:
    """The weighted mean of several pictures' features, such as an appearance between two others.

    Args:
        features: Of one layer and facet of one ViT, with equal batch sizes.
        weights: One for each, at least 0; they are normalised to a sum of 1.

    Returns:
        Their mean. Where their grids differ no patch has a counterpart: `tokens` is then `[B, 0, D]` and `grid` (0, 0).

    Raises:
        SpliceError: Features that cannot be blended, weights of another number, or none above 0.
    """
    first = features[0]
    for what in ("backbone", "layer", "facet"):
        if len(values := dict.fromkeys(str(getattr(f, what)) for f in features)) > 1:
            raise SpliceError(f"features of {what} {' and '.join(values)} cannot be blended: extract all from one")
    if len(counts := dict.fromkeys(str(len(f.cls)) for f in features)) > 1:
        raise SpliceError(f"features of {' and '.join(counts)} pictures cannot be blended: give as many of each")
    shares = to_shares(weights, len(features), "features")

    def mean(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(dim=0)

    same = all(f.grid == first.grid for f in features)
    return replace(
        first,
        cls=mean([f.cls for f in features]),
        tokens=mean([f.tokens for f in features]) if same else first.tokens[:, :0],
        prefix=mean([f.prefix for f in features]),
        grid=first.grid if same else (0, 0),
    )
