"""Descriptors of a picture's cells, by which the matching compares them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import check_mask, resize, sides
from ..masks import covered_patches
from ..vit.backbone import Backbone, Request
from ..vit.dense import extract_dense

MATCH_PATCHES = 28
"""Patches along a picture's short side for matching."""

MATCH_FACETS = (
    Request(-4, "token"),
    Request(-3, "token"),
    Request(-2, "key"),
    Request(-1, "key"),
    Request(-1, "query"),
)
"""What is compared: tokens of middle blocks distinguish parts, such as an eye or the rim of a slice, keys and queries
of the last ones objects and background; both are needed. Tokens of the last blocks hold places in the picture too."""

MEAN_BRIGHTNESS, MOST_GAMMA, GAMMA_STEPS = 0.52, 4.0, 5
"""Mean of each channel of what the ViT gets, as in a bright photograph; the largest exponent that brings it there (the
smallest is its inverse), and the steps in which it is found."""

OUTLINE_CHANGES = (0.3, 0.8)
"""One minus the cosine of descriptors a patch apart, from which an outline begins and at which it is one fully: within
one part it is 0.1 or less."""

CELL_PIXELS = 8
"""Pixels per cell and axis at which it is counted what a mask covers of it."""


def working_size(picture: Tensor, backbone: Backbone, short_patches: int) -> tuple[int, int]:
    """(height, width) in pixels at which a picture has so many patches along its short side."""
    short = short_patches * backbone.patch
    return backbone.grid_size(*sides(picture), short=short, longest=2 * short)


def covered_cells(mask: Tensor | None, name: str, grid: tuple[int, int], backbone: Backbone) -> Tensor | None:
    """The cells of a grid over a picture that its mask covers, `[h·w]` booleans; None without a mask."""
    if mask is None:
        return None
    mask = check_mask(mask, name).to(backbone.device)
    return covered_patches(mask, (grid[0] * CELL_PIXELS, grid[1] * CELL_PIXELS), CELL_PIXELS)


def describe(
    picture: Tensor,
    backbone: Backbone,
    size: tuple[int, int],
    grid: tuple[int, int],
    requests: Sequence[Request],
    centre: Tensor | None,
    density: int = 1,
) -> Tensor:
    """Descriptors `[N, D]` whose dot products are the means of the requests' cosines.

    The ViT gets the picture in balanced exposure. Features of it and of its mirror image are added: that weakens their
    dependence on position, and the descriptors of a mirrored picture are the mirrored descriptors. On a finer grid each
    of them is read at every second cell, the mirror image where the picture is not: half of the time, equal pictures.

    Args:
        picture: `[1, 3, H, W]`.
        backbone: The ViT.
        size: (height, width) in pixels of what it gets.
        grid: (height, width) in cells.
        requests: The facets.
        centre: `[N]` booleans, the cells whose mean is subtracted and whose exposure counts; None is all of them.
        density: Features that are extracted per patch and axis; they are interpolated to the grid.
    """
    picture = resize(picture.to(backbone.device), size)
    counts = None if centre is None else F.interpolate(centre.view(1, 1, *grid).float(), size, mode="nearest")
    picture = balance_exposure(picture, counts)
    extracted = extract_dense(torch.cat([picture, picture.flip(-1)]), backbone, requests, density, every_second=True)
    parts = []
    for request in requests:
        features = (extracted[request][0] + extracted[request][1].flip(1)).movedim(-1, 0)[None]
        if sides(features) != grid:
            features = F.interpolate(features, grid, mode="bilinear", align_corners=False)
        tokens = features[0].flatten(1).T
        mean = (tokens if centre is None else tokens[centre]).mean(dim=0)
        parts.append(F.normalize(tokens - mean, dim=-1))
    return torch.cat(parts, dim=-1) / len(requests) ** 0.5


def find_outlines(descriptors: Tensor, grid: tuple[int, int], density: int) -> Tensor:
    """Where one part of a picture ends and another begins: there descriptors change from cell to cell.

    Args:
        descriptors: `[N, D]`, as `describe` returns them.
        grid: (height, width) in cells.
        density: Cells per patch and axis.

    Returns:
        `[1, 1, h, w]` in 0..1.
    """
    reach = max(1, density // 2)
    field = F.normalize(descriptors, dim=-1).T.reshape(1, -1, *grid)
    field = F.pad(field, [reach] * 4, mode="replicate")

    def moved(down: int, right: int) -> Tensor:
        return field[..., reach + down : reach + down + grid[0], reach + right : reach + right + grid[1]]

    axes = ((0, reach), (reach, 0), (reach, reach), (reach, -reach))
    nearest = torch.stack([(moved(*step) * moved(-step[0], -step[1])).sum(dim=1, keepdim=True) for step in axes])
    begin, full = OUTLINE_CHANGES
    return ((1 - nearest.amin(dim=0) - begin) / (full - begin)).clamp(0, 1)


def balance_exposure(picture: Tensor, weight: Tensor | None = None) -> Tensor:
    """The picture with a gamma for each channel that makes its mean 0.52, so far as exponents of 1/4 to 4 can.

    Night and snow, lamplight and shade become photographs as the ViT knows them: in a picture left as dark as it is,
    eyes and shaded sides of objects are matched with whatever is dark.

    Args:
        picture: `[1, 3, H, W]` in 0..1.
        weight: `[1, 1, H, W]`, how much each place counts; None is equally.
    """
    weight = torch.ones_like(picture[:, :1]) if weight is None else weight
    picture = picture.clamp(0, 1)
    gamma = torch.ones_like(picture[..., :1, :1])
    for _ in range(GAMMA_STEPS):
        mean = (picture**gamma * weight).sum(dim=(2, 3), keepdim=True) / weight.sum()
        gamma = gamma * math.log(MEAN_BRIGHTNESS) / mean.clamp(1e-3, 1 - 1e-3).log()
        gamma = gamma.clamp(1 / MOST_GAMMA, MOST_GAMMA)
    return picture**gamma


def principal_directions(x: Tensor, count: int) -> Tensor:
    """`[D, count]`: orthonormal directions that hold most of the rows of `[N, D]`, by subspace iteration.

    torch's own routine starts from the global random state, so that a run would neither repeat nor leave it alone.
    """
    start = torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(0)).to(x.device)
    for _ in range(4):
        # On the CPU: the matrix is small, and not every accelerator has a QR decomposition.
        start = torch.linalg.qr((x.T @ (x @ start)).cpu()).Q.to(x.device)
    return start
