"""Paints a picture with patches of an exemplar, at any size."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, sides
from .filters import expand

VOTE_PATCH = 3
"""Side in pixels of the overlapping patches that are averaged in the end: smaller is sharper."""

BANDS = 2
"""Bands above the coarsest one in a picture of the guide's size: in that one, patches are blended over four of its
pixels. A picture twice as large has one more."""

PAINT_ROWS = 32
"""Rows that are painted at a time, so that what this takes fits into a processor's cache."""


@torch.no_grad()
def paint(exemplar: Tensor, offsets: Tensor, size: tuple[int, int], mirrored: bool = False) -> Tensor:
    """Paints a picture with the patches that were found, at any size.

    Args:
        exemplar: `[1, 3, H', W']` in 0..1, larger than the one that was searched by the factor of H and h.
        offsets: `[2, h, w]`, as `find_offsets` returns them.
        size: (height, width) of the picture.
        mirrored: As for `find_offsets`; this exemplar is without its mirror image.

    Returns:
        `[1, 3, H, W]` in 0..1.
    """
    scale = offsets.new_tensor([side / found for side, found in zip(size, sides(offsets), strict=True)]).view(2, 1, 1)
    nearest_row, nearest_column = (
        _nearest(found, side).to(offsets.device) for side, found in zip(size, sides(offsets), strict=True)
    )
    exemplar = exemplar.contiguous(memory_format=torch.channels_last)
    (height, width), reach = size, VOTE_PATCH // 2
    columns = torch.arange(width, device=offsets.device)
    picture = exemplar.new_empty(1, 3, height, width)
    for top in range(0, height, PAINT_ROWS):
        bottom = min(top + PAINT_ROWS, height)
        rows = torch.arange(top - reach, bottom + reach, device=offsets.device).clamp(0, height - 1)
        here = positions(rows, columns)
        places = here + (offsets[:, nearest_row[rows]][..., nearest_column] * scale).round().long()
        painted = paint_patches(exemplar, places, here, VOTE_PATCH, mirrored)
        picture[..., top:bottom, :] = painted[..., reach : reach + bottom - top, :]
    return picture


@torch.no_grad()
def paint_in_bands(
    exemplar: Tensor, offsets: Tensor, size: tuple[int, int], mirrored: bool = False, sampling: str = "nearest"
) -> Tensor:
    """Paints a picture as `paint` does, one band of frequencies after the other, so that its patches have no seams.

    The bands of the exemplar are painted, each at its own resolution: where two patches meet, what is coarse passes
    smoothly from one to the other and what is fine stays sharp (Burt and Adelson, "A Multiresolution Spline with
    Application to Image Mosaics", 1983). Arguments and result as for `paint`, but values may exceed 0..1; "bilinear"
    sampling also takes what lies between the exemplar's pixels.
    """
    count = max(0, BANDS + round(math.log2(min(size) / min(sides(offsets)))))
    sizes = [size]
    for _ in range(count):
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    searched = [side * found / to for side, found, to in zip(sides(exemplar), sides(offsets), size, strict=True)]
    bands = []
    for _ in range(count):
        half = reduce(exemplar, 2)
        # So smooth that it makes little difference which of its pixels is the nearest one.
        smooth = expand(reduce(half, 2), sides(half))
        bands.append(exemplar - expand(smooth, sides(exemplar)))
        exemplar = smooth
    picture = sample(exemplar, offsets, searched, sizes[-1], mirrored, sampling)
    for band, at in zip(bands[::-1], sizes[-2::-1], strict=True):
        picture = expand(picture, at).add_(sample(band, offsets, searched, at, mirrored, sampling))
    return picture


def sample(
    exemplar: Tensor,
    offsets: Tensor,
    searched: Sequence[float],
    size: tuple[int, int],
    mirrored: bool,
    sampling: str = "nearest",
) -> Tensor:
    """Paints with single pixels, or with whatever else is known of the exemplar's places.

    Args:
        exemplar: `[1, C, H', W']`, of any size.
        offsets: In pixels of an exemplar whose (height, width) was `searched`.
        searched: That size.
        size: (height, width) of the picture.
        mirrored: As for `paint`.
        sampling: "nearest" or "bilinear".

    Returns:
        `[1, C, H, W]`.
    """
    picture = exemplar.new_empty(1, exemplar.shape[1], *size)
    nearest_row, nearest_column = (
        _nearest(found, side).to(offsets.device) for side, found in zip(size, sides(offsets), strict=True)
    )
    columns = (torch.arange(size[1], device=offsets.device) + 0.5) * (offsets.shape[2] / size[1])
    for top in range(0, size[0], PAINT_ROWS):
        bottom = min(top + PAINT_ROWS, size[0])
        rows = (torch.arange(top, bottom, device=offsets.device) + 0.5) * (offsets.shape[1] / size[0])
        there = offsets[:, nearest_row[top:bottom]][..., nearest_column]
        y, x = (rows[:, None] + there[0]) / searched[0], (columns + there[1]) / searched[1]
        if mirrored:
            x = torch.minimum(x, 2 - x)
        grid = torch.stack([2 * x - 1, 2 * y - 1], dim=-1)[None]
        picture[..., top:bottom, :] = F.grid_sample(exemplar, grid, sampling, "border", align_corners=False)
    return picture


def _nearest(length: int, resized: int) -> Tensor:
    """`[resized]`: for each pixel of an axis that is resized the one of its `length` pixels that is nearest."""
    return F.interpolate(torch.arange(float(length))[None, None], resized, mode="nearest-exact")[0, 0].long()


def positions(rows: Tensor, columns: Tensor) -> Tensor:
    """`[2, h, w]`: row and column of each pixel in these rows `[h]` and columns `[w]`."""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def clamp_places(places: Tensor, size: tuple[int, int]) -> Tensor:
    """The places, with those outside an exemplar of some size moved to its border."""
    return torch.stack([places[0].clamp(0, size[0] - 1), places[1].clamp(0, size[1] - 1)])


def propagate(places: Tensor, here: Tensor, size: tuple[int, int], down: int, right: int) -> Tensor:
    """For each pixel the place that continues the patch of the neighbour `down` rows and `right` columns away."""
    rows, columns = (
        (torch.arange(side, device=places.device) + step).clamp(0, side - 1)
        for side, step in zip(sides(places), (down, right), strict=True)
    )
    offsets = (places - here).index_select(1, rows).index_select(2, columns)
    return clamp_places(offsets + here, size)


def paint_patches(exemplar: Tensor, places: Tensor, here: Tensor, side: int, mirrored: bool = False) -> Tensor:
    """The picture `[1, 3, h, w]` of overlapping patches of `side` pixels, averaged where they overlap."""
    height, width = sides(exemplar)
    size = (height, 2 * width if mirrored else width)
    places = clamp_places(places, size)
    reach = range(-(side // 2), side // 2 + 1)
    pixels = exemplar[0].permute(1, 2, 0).flatten(0, 1)
    total = pixels.new_zeros(places[0].numel(), 3)
    for down in reach:
        for right in reach:
            rows, columns = propagate(places, here, size, down, right)
            if mirrored:
                columns = torch.minimum(columns, 2 * width - 1 - columns)
            total += pixels.index_select(0, (rows * width + columns).flatten())
    return (total / side**2).T.reshape(1, 3, *sides(places))


def reduce(x: Tensor, reduction: int) -> Tensor:
    """`[1, C, h, w]` made `reduction` times smaller."""
    height, width = sides(x)
    return resize(x, (max(1, height // reduction), max(1, width // reduction)))
