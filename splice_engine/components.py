"""Principal components of what a ViT sees, as colours: alike parts get alike colours (paper, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SpliceError
from .features import Features
from .images import sides

SELF_SIMILARITY = "self-similarity"
"""What the paper shows the components of: rows of the keys' self-similarity, where else a facet is named."""

VIEW = 448
"""Short side in pixels at which the ViT looks at pictures for their maps."""

COLOURS = 3
"""Components that make a picture: red, green and blue."""

TAIL = 0.01
"""Share of the patches at either end of a component whose colours saturate, so that no outlier greys out the rest."""

LEVELS = 256
"""Steps in which the threshold between object and ground is sought."""


@dataclass(frozen=True)
class Components:
    """Principal components of one batch of pictures, on its patch grid.

    Attributes:
        scores: `[B, C, h, w]`, each patch in the coordinates of the C strongest components, strongest first.
        colours: `[B, 3, h, w]` in 0..1, the first three of them; black where there is no object.
        foreground: `[B, 1, h, w]`, 1 on the object and 0 on the ground; 1 everywhere unless the split was asked for.
    """

    scores: Tensor
    colours: Tensor
    foreground: Tensor

    def image(self, size: tuple[int, int], smooth: bool = True) -> Tensor:
        """The colours at a picture's size.

        Args:
            size: (height, width) in pixels.
            smooth: Bicubic between the patches' centres; otherwise each patch is a block.

        Returns:
            `[B, 3, H, W]` in 0..1.
        """
        return enlarge(self.colours, size, smooth).clamp(0, 1)

    def mask(self, size: tuple[int, int], smooth: bool = True) -> Tensor:
        """The foreground at a picture's size, `[B, 1, H, W]` in 0..1; arguments as for `image`."""
        return enlarge(self.foreground, size, smooth).clamp(0, 1)


def pca(
    features: Sequence[Features], count: int = COLOURS, self_similarity: bool = False, foreground: bool = False
) -> list[Components]:
    """Principal components fitted jointly over batches of pictures, so that equal colours mean equal parts.

    Args:
        features: One entry for each batch; grids may differ, facet and layer should not.
        count: Components to keep, at least three.
        self_similarity: Of the rows of the patches' cosine self-similarity (the paper's figure, with keys), taken over
            the patches of all pictures together; otherwise of the features themselves.
        foreground: Leave out the ground: the first component is split in two, the half that the pictures' borders
            have more of than their insides is the ground, and the components are those of the other half alone.

    Returns:
        One entry for each batch.

    Raises:
        SpliceError: No features, fewer than three components, or more than there can be.
    """
    if not features:
        raise SpliceError("there is nothing to take components of: give at least one picture")
    # Double precision settles which of two near components comes first; not every accelerator has it.
    rows = torch.cat([entry.tokens.detach().flatten(0, 1) for entry in features]).cpu().double()
    if self_similarity:
        rows = _self_similarity_coordinates(rows)
    kept = torch.ones(len(rows), dtype=torch.bool)
    if foreground:
        first = principal_components(rows, 1)[0][:, 0]
        kept = _object(first, torch.cat([_border(entry) for entry in features]))
    if not COLOURS <= count <= min(int(kept.sum()), rows.shape[1]):
        raise SpliceError(
            f"{count} components cannot be had of {int(kept.sum())} patches: ask for {COLOURS} to {rows.shape[1]}, "
            "of pictures with more patches than that"
        )
    _, directions, mean = principal_components(rows[kept], count)
    scores = (rows - mean) @ directions.T
    colours = _colours(scores[:, :COLOURS], scores[kept, :COLOURS]) * kept[:, None]
    counts = [len(entry.tokens) * entry.tokens.shape[1] for entry in features]
    return [
        Components(*(_on_grid(part, entry) for part in parts))
        for entry, *parts in zip(
            features, *(x.float().split(counts) for x in (scores, colours, kept[:, None])), strict=True
        )
    ]


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The strongest principal components of `[N, D]`.

    Returns:
        Scores `[N, count]`, directions `[count, D]` and mean `[D]`. Of each component's two signs it is the one whose
        largest score is positive.
    """
    mean = rows.mean(dim=0)
    centred = rows - mean
    directions = torch.linalg.eigh(centred.T @ centred)[1].flip(-1)[:, :count].T  # eigh has the weakest first
    scores = centred @ directions.T
    signs = torch.where(scores.amax(dim=0) >= -scores.amin(dim=0), 1.0, -1.0)
    return scores * signs, directions * signs[:, None], mean


def enlarge(grid: Tensor, size: tuple[int, int], smooth: bool = True) -> Tensor:
    """`[B, C, h, w]` at `size` = (height, width): bicubic between the patches' centres, or in blocks."""
    if not smooth:
        return F.interpolate(grid, size, mode="nearest-exact")
    shrinks = size[0] < sides(grid)[0] or size[1] < sides(grid)[1]
    return F.interpolate(grid, size, mode="bicubic", align_corners=False, antialias=shrinks)


def _self_similarity_coordinates(rows: Tensor) -> Tensor:
    """`[N, D]` whose principal components are those of the rows of the self-similarity matrix `[N, N]`.

    With U the unit rows, the matrix is U·Uᵀ. Its centred rows X have X·Xᵀ = U'·G·U'ᵀ, where U' is U centred and
    G = UᵀU, the same as the centred rows of U·√G. So the large matrix is never made.
    """
    unit = F.normalize(rows, dim=-1)
    strengths, directions = torch.linalg.eigh(unit.T @ unit)
    root: Tensor = (directions * strengths.clamp_min(0).sqrt()) @ directions.T
    return unit @ root


def _object(first: Tensor, border: Tensor) -> Tensor:
    """Which patches `[N]` belong to the object, by their first component and whether they touch a border."""
    high = first > _threshold(first)
    inside = ~border if (~border).any() else border
    return ~high if high[border].double().mean() > high[inside].double().mean() else high


def _threshold(values: Tensor) -> Tensor:
    """Where values `[N]` fall into two groups with the least variance within each (Otsu, 1979)."""
    low, high = values.aminmax()
    steps = torch.linspace(0, 1, LEVELS + 1, dtype=values.dtype)[1:-1]
    thresholds = low + (high - low) * steps
    above = values[None] > thresholds[:, None]
    share = above.double().mean(dim=1)
    mean_above = (above * values).mean(dim=1)
    between = (mean_above - share * values.mean()) ** 2 / (share * (1 - share)).clamp_min(1e-12)
    return thresholds[between.argmax()]


def _border(features: Features) -> Tensor:
    """Which patches `[B·N]` lie at the edge of their picture."""
    height, width = features.grid
    edge = torch.ones(height, width, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge.flatten().repeat(len(features.tokens))


def _colours(scores: Tensor, reference: Tensor) -> Tensor:
    """Scores `[N, 3]` in 0..1, by quantiles of the reference's."""
    low, high = (torch.quantile(reference, share, dim=0) for share in (TAIL, 1 - TAIL))
    return ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def _on_grid(values: Tensor, features: Features) -> Tensor:
    """`[B·N, C]` as `[B, C, h, w]` on the features' device."""
    return values.unflatten(0, (len(features.tokens), *features.grid)).permute(0, 3, 1, 2).to(features.tokens.device)
