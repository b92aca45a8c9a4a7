"""Principal components of ViT features as colours: similar parts get similar colours (paper, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError
from ..images import enlarge
from ..vit.features import Features

SELF_SIMILARITY = "self-similarity"
"""Name, beside those of the facets, for the components of the rows of the keys' self-similarity, as in the paper."""

MAP_SIZE = 448
"""Default short side in pixels of what the ViT gets for component and attention maps."""

RGB_COMPONENTS = 3
"""Components that are shown, as red, green and blue."""

SATURATED_SHARE = 0.01
"""Share of the patches at either end of a component whose colours saturate, so that outliers do not grey the rest."""

THRESHOLD_LEVELS = 256
"""Intervals between the candidates for the threshold between foreground and background."""


@dataclass(frozen=True)
class Components:
    """Principal components of one batch of pictures, on its patch grid.

    Attributes:
        scores: `[B, C, h, w]`, projections of the patches onto the C strongest components, strongest first.
        colours: `[B, 3, h, w]` in 0..1, the first three of them; black in the background.
        foreground: `[B, 1, h, w]`, 1 in the foreground, 0 in the background; 1 everywhere where no split was requested.
    """

    scores: Tensor
    colours: Tensor
    foreground: Tensor

    def image(self, size: tuple[int, int], smooth: bool = True) -> Tensor:
        """Resizes the colours to a picture.

        Args:
            size: (height, width) in pixels.
            smooth: Bicubic between the patches' centres; otherwise each patch is a block.

        Returns:
            `[B, 3, H, W]` in 0..1.
        """
        return enlarge(self.colours, size, smooth).clamp(0, 1)

    def mask(self, size: tuple[int, int], smooth: bool = True) -> Tensor:
        """Resizes the foreground to a picture, `[B, 1, H, W]` in 0..1; arguments as for `image`."""
        return enlarge(self.foreground, size, smooth).clamp(0, 1)


def pca(
    features: Sequence[Features], count: int = RGB_COMPONENTS, self_similarity: bool = False, foreground: bool = False
) -> list[Components]:
    """Fits principal components jointly over batches of pictures, so that equal colours mean equal parts.

    Args:
        features: One entry for each batch; grids may differ, facet and layer should not.
        count: Components to keep, at least three.
        self_similarity: Fit the rows of the patches' cosine self-similarity (the paper's figure, with keys), taken over
            the patches of all pictures together; otherwise the features themselves.
        foreground: Leave out the background: the first component is split in two, the part that is more frequent at
            the pictures' borders than inside is the background, and the components are fitted to the other part alone.

    Returns:
        One entry for each batch.

    Raises:
        SpliceError: No features, fewer than three components, or more than there can be.
    """
    if not features:
        raise SpliceError("there is nothing to compute components of: give at least one picture")
    # Double precision makes the order of components of nearly equal strength stable; not every accelerator has it.
    rows = torch.cat([entry.tokens.detach().flatten(0, 1) for entry in features]).cpu().double()
    if self_similarity:
        rows = _self_similarity_coordinates(rows)
    kept = torch.ones(len(rows), dtype=torch.bool)
    if foreground:
        first = principal_components(rows, 1)[0][:, 0]
        kept = _split_foreground(first, torch.cat([_border(entry) for entry in features]))
    if not RGB_COMPONENTS <= count <= min(int(kept.sum()), rows.shape[1]):
        raise SpliceError(
            f"{count} components cannot be had of {int(kept.sum())} patches: ask for {RGB_COMPONENTS} to "
            f"{rows.shape[1]}, of pictures with more patches than that"
        )
    _, directions, mean = principal_components(rows[kept], count)
    scores = (rows - mean) @ directions.T
    colours = _to_colours(scores[:, :RGB_COMPONENTS], scores[kept, :RGB_COMPONENTS]) * kept[:, None]
    counts = [len(entry.tokens) * entry.tokens.shape[1] for entry in features]
    return [
        Components(*(_to_grid(part, entry) for part in parts))
        for entry, *parts in zip(
            features, *(x.float().split(counts) for x in (scores, colours, kept[:, None])), strict=True
        )
    ]


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The strongest principal components of rows `[N, D]`, by eigendecomposition of their covariance.

    Returns:
        Scores `[N, count]`, directions `[count, D]` and mean `[D]`. The sign of each component is that for which
        the score of largest magnitude is positive.
    """
    mean = rows.mean(dim=0)
    centred = rows - mean
    directions = torch.linalg.eigh(centred.T @ centred)[1].flip(-1)[:, :count].T  # eigh sorts the weakest first
    scores = centred @ directions.T
    signs = torch.where(scores.amax(dim=0) >= -scores.amin(dim=0), 1.0, -1.0)
    return scores * signs, directions * signs[:, None], mean


def _self_similarity_coordinates(rows: Tensor) -> Tensor:
    """Rows `[N, D]` with the principal component scores of the rows of the self-similarity matrix `[N, N]`.

    With U the unit rows, the matrix is U·Uᵀ. Its centred rows X have X·Xᵀ = U'·G·U'ᵀ, where U' is U centred and
    G = UᵀU, the same as the centred rows of U·√G. So the large matrix is never computed.
    """
    unit = F.normalize(rows, dim=-1)
    strengths, directions = torch.linalg.eigh(unit.T @ unit)
    root: Tensor = (directions * strengths.clamp_min(0).sqrt()) @ directions.T
    return unit @ root


def _split_foreground(first: Tensor, border: Tensor) -> Tensor:
    """Foreground patches `[N]`, by their scores on the first component and whether they lie at a border."""
    high = first > _otsu_threshold(first)
    inside = ~border if (~border).any() else border
    return ~high if high[border].double().mean() > high[inside].double().mean() else high


def _otsu_threshold(values: Tensor) -> Tensor:
    """The threshold that splits values `[N]` into two groups with the least variance within each (Otsu, 1979)."""
    low, high = values.aminmax()
    steps = torch.linspace(0, 1, THRESHOLD_LEVELS + 1, dtype=values.dtype)[1:-1]
    thresholds = low + (high - low) * steps
    above = values[None] > thresholds[:, None]
    share = above.double().mean(dim=1)
    mean_above = (above * values).mean(dim=1)
    between = (mean_above - share * values.mean()) ** 2 / (share * (1 - share)).clamp_min(1e-12)
    return thresholds[between.argmax()]


def _border(features: Features) -> Tensor:
    """Booleans `[B·N]`, true for the patches at the edge of their picture."""
    height, width = features.grid
    edge = torch.ones(height, width, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten().repeat(len(features.tokens))


def _to_colours(scores: Tensor, reference: Tensor) -> Tensor:
    """Scores `[N, 3]` scaled to 0..1 by quantiles of reference scores `[M, 3]`."""
    low, high = (torch.quantile(reference, share, dim=0) for share in (SATURATED_SHARE, 1 - SATURATED_SHARE))
    return ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def _to_grid(values: Tensor, features: Features) -> Tensor:
    """Reshapes `[B·N, C]` to `[B, C, h, w]`, on the features' device."""
    return values.unflatten(0, (len(features.tokens), *features.grid)).permute(0, 3, 1, 2).to(features.tokens.device)
