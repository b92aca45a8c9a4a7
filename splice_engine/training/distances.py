"""Distances: relaxed optimal transport, sliced Wasserstein distances of patches, and local correlation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import sides
from ..matching.filters import box_mean

PATCH_SIDE = 7
"""Pixels of the patches of a level."""

PATCHES, DIRECTIONS = 4096, 64
"""Patches of each picture in a step, and directions that they are projected on."""

EDGE_RADIUS = 4
"""Pixels around a place within which two pictures are correlated."""

FAINT = 1e-4
"""Variance that is not told from none: a contrast of 0.01."""


def relaxed_transport(cost: Tensor) -> Tensor:
    """The relaxed earth mover's distance of a matrix of costs `[N, M]` (Kusner et al., 2015), a scalar.

    Each row goes to its nearest column, or each column to its nearest row, whichever costs more.
    """
    return torch.maximum(cost.amin(dim=1).mean(), cost.amin(dim=0).mean())


def edge_distance(grey: Tensor, wanted: Tensor, share: Tensor) -> Tensor:
    """How far a picture lacks the edges of another, in whichever direction and contrast, a scalar in 0..1.

    One minus the squared correlation around each pixel, as in the registration of medical images (Avants et al.,
    "Symmetric Diffeomorphic Image Registration with Cross-Correlation", 2008), weighted towards places that have
    contrast in the wanted picture.

    Args:
        grey: `[1, 1, h, w]`; differentiable.
        wanted: Likewise.
        share: `[1, 1, h, w]` in 0..1, how much each place counts.
    """
    mean, wanted_mean = box_mean(grey, EDGE_RADIUS), box_mean(wanted, EDGE_RADIUS)
    variance, wanted_variance = (
        (box_mean(x.square(), EDGE_RADIUS) - of.square()).clamp_min(0)
        for x, of in ((grey, mean), (wanted, wanted_mean))
    )
    shared = box_mean(grey * wanted, EDGE_RADIUS) - mean * wanted_mean
    correlation = shared.square() / ((variance + FAINT) * (wanted_variance + FAINT))
    weight = share * wanted_variance / (wanted_variance + wanted_variance.mean() + FAINT)
    return (weight * (1 - correlation)).sum() / (weight.sum() + FAINT)


def patch_distance(
    levels: Sequence[Tensor],
    wanted: Sequence[Tensor],
    cells: tuple[Tensor, Tensor],
    grids: tuple[tuple[int, int], tuple[int, int]],
    rng: torch.Generator,
) -> Tensor:
    """The sliced Wasserstein distance between patches of two Laplacian pyramids, at places that belong together.

    As a measure of textures: Karras et al., "Progressive Growing of GANs" (2018).

    Args:
        levels: Of the picture, `[1, 3, h, w]` each.
        wanted: Of the exemplar, likewise and as many.
        cells: `[N]` cells of the picture's grid, and for each its match in the exemplar's.
        grids: (height, width) of both grids in cells.
        rng: Draws cells, places within them, and directions.

    Returns:
        A scalar, differentiable in `levels`; the sum over levels, each relative to the contrast of the exemplar's.
    """
    device = levels[0].device
    drawn = torch.randint(len(cells[0]), (PATCHES,), generator=rng).to(device)
    within = torch.rand(2, PATCHES, 2, generator=rng).to(device)
    size = levels[0].shape[1] * PATCH_SIDE**2
    directions = F.normalize(torch.randn(size, DIRECTIONS, generator=rng), dim=0).to(device)
    distances = []
    for mine, theirs in zip(levels, wanted, strict=True):
        projected = [
            _patches(level, cell[drawn], grid, jitter) @ directions
            for level, cell, grid, jitter in zip((mine, theirs), cells, grids, within, strict=True)
        ]
        ordered = [projection.sort(dim=0).values for projection in projected]
        distances.append((ordered[0] - ordered[1]).abs().mean() / theirs.std().clamp_min(1e-4))
    return torch.stack(distances).sum()


def _patches(level: Tensor, cells: Tensor, grid: tuple[int, int], within: Tensor) -> Tensor:
    """Patches `[N, C·PATCH_SIDE²]` of a level around places `[N, 2]` within cells `[N]` of a grid over it."""
    level = F.pad(level, [PATCH_SIDE // 2] * 4, mode="replicate")
    height, width = sides(level)
    last = torch.tensor([height - PATCH_SIDE, width - PATCH_SIDE], device=level.device)
    places = torch.stack([cells // grid[1], cells % grid[1]], dim=1)
    places = (places + within) / torch.tensor(grid, device=level.device) * (last + 1)
    corners = places.long().minimum(last)
    reach = torch.arange(PATCH_SIDE, device=level.device)
    rows, columns = corners[:, :1] + reach, corners[:, 1:] + reach
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten()
    patches = level[0].flatten(1).index_select(1, index)
    return patches.view(level.shape[1], len(cells), -1).movedim(0, 1).flatten(1)
