"""Guided patch synthesis: finds the patches of an exemplar to paint a picture with, and paints it at any size.

Image analogies (Hertzmann et al., 2001), searched by PatchMatch (Barnes et al., 2009) from coarse to fine: each pixel
takes the patch that is nearest in the guides' descriptors and in the colours painted so far. A patch costs the more,
the more it is used (Kaspar et al., 2015); otherwise a few smooth patches would be spread over the whole picture.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, sides
from .filters import expand

PATCH = 5
"""Side in pixels of the patches that are compared."""

VOTE_PATCH = 3
"""Side in pixels of the overlapping patches that are averaged in the end: smaller is sharper."""

BANDS = 2
"""Bands above the coarsest one in a picture of the guide's size: in that one, patches are blended over four of its
pixels. A picture twice as large has one more."""

PATCH_COMPONENTS = 16
"""Principal components of a patch's colours that are compared."""

USAGE_COST = 0.03
"""Cost of a patch that is used as often as the average one; as much as a difference of 0.1 in each channel."""

USAGE_WINDOW = 9
"""Side in pixels of the squares over which usage is averaged."""

JUMP_FACTOR = 1.5
"""What a patch found at random has to undercut: the cost so far divided by this. Patches that continue their
neighbours' are preferred (Ashikhmin, 2001), so that B's texture comes in pieces and not in shreds."""

PAINT_ROWS = 32
"""Rows that are painted at a time, so that what this takes fits into a processor's cache."""

SEARCH_LEVELS = ((2, 2), (1, 3))
"""For each level, coarse to fine: the factor by which it is smaller than the guide, and its rounds of search."""


@torch.no_grad()
def find_offsets(
    exemplar: Tensor,
    guide: Tensor,
    exemplar_guide: Tensor,
    start: Tensor,
    cost: Tensor | None = None,
    mirrored: bool = False,
) -> Tensor:
    """Finds the patches of an exemplar with which to paint a picture of the guide's size.

    Args:
        exemplar: `[1, 3, H', W']` in 0..1, the picture that the patches come from.
        guide: `[1, C, H, W]`, descriptors of the places to paint. Their squared distance to those of the exemplar is
            added to the mean squared difference of the colours.
        exemplar_guide: `[1, C, H', W']`, the descriptors of the exemplar.
        start: `[2, h, w]`, for each cell of a grid over the picture the offset (rows, columns) in pixels to the
            patches that the search starts from.
        cost: `[1, 1, H', W']`, further cost of each place of the exemplar; None is no cost.
        mirrored: The right half of the exemplar is the mirror image of the left one. Each pixel then keeps to the half
            in which it starts: in a search that may change between them, stripes and grain become zigzags.

    Returns:
        `[2, H, W]`, for each pixel the offset (rows, columns) in pixels to its patch in the exemplar. The search is
        deterministic: it has a random source of its own.
    """
    rng = torch.Generator().manual_seed(0)
    offsets = start.float()
    cost = torch.zeros_like(exemplar[:, :1]) if cost is None else cost
    for reduction, rounds in SEARCH_LEVELS:
        level = _Level(mirrored, *(_reduce(x, reduction) for x in (exemplar, guide, exemplar_guide, cost)))
        wide = F.interpolate(offsets[None], sides(level.guide), mode="nearest")[0]
        places = _clamp(level.here + (wide / reduction).round().long(), sides(level.exemplar))
        for _ in range(rounds):
            places = level.search(places, _paint(level.exemplar, places, level.here, PATCH), rng)
        offsets = (places - level.here).float() * reduction
    return offsets


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
        here = _positions(rows, columns)
        places = here + (offsets[:, nearest_row[rows]][..., nearest_column] * scale).round().long()
        painted = _paint(exemplar, places, here, VOTE_PATCH, mirrored)
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
        half = _reduce(exemplar, 2)
        # So smooth that it makes little difference which of its pixels is the nearest one.
        smooth = expand(_reduce(half, 2), sides(half))
        bands.append(exemplar - expand(smooth, sides(exemplar)))
        exemplar = smooth
    picture = _sample(exemplar, offsets, searched, sizes[-1], mirrored, sampling)
    for band, at in zip(bands[::-1], sizes[-2::-1], strict=True):
        picture = expand(picture, at).add_(_sample(band, offsets, searched, at, mirrored, sampling))
    return picture


def _sample(
    exemplar: Tensor,
    offsets: Tensor,
    searched: Sequence[float],
    size: tuple[int, int],
    mirrored: bool,
    sampling: str,
) -> Tensor:
    """Paints with single pixels.

    Args:
        exemplar: `[1, 3, H', W']`, of any size.
        offsets: In pixels of an exemplar whose (height, width) was `searched`.
        searched: That size.
        size: (height, width) of the picture.
        mirrored: As for `paint`.
        sampling: "nearest" or "bilinear".
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


class _Level:
    """One level of the pyramid: the patches of the exemplar, and the search among them.

    A field of places `[2, h, w]` holds for each pixel of the picture the row and column of its patch's centre in the
    exemplar.
    """

    def __init__(self, mirrored: bool, exemplar: Tensor, guide: Tensor, exemplar_guide: Tensor, cost: Tensor) -> None:
        self.guide, self.cost = guide, cost.flatten()
        self.here = _positions(*(torch.arange(side, device=guide.device) for side in sides(guide)))
        self.exemplar = exemplar
        self.part_width = exemplar.shape[-1] // 2 if mirrored else exemplar.shape[-1]
        patches = _extract_patches(exemplar)
        centred = patches - patches.mean(dim=0)
        scatter = (centred.T @ centred).cpu()  # small, and not every accelerator has eigh
        self.basis = torch.linalg.eigh(scatter).eigenvectors[:, -PATCH_COMPONENTS:].to(exemplar.device) / PATCH
        self.patches = torch.cat([patches @ self.basis, exemplar_guide[0].flatten(1).T], dim=1)
        self.usage: Tensor | None = None

    def search(self, places: Tensor, picture: Tensor, rng: torch.Generator) -> Tensor:
        """One round of search for patches of lower cost: propagation from neighbours, then random search.

        Args:
            places: `[2, h, w]`, the patches so far.
            picture: `[1, 3, h, w]`, what they paint.
            rng: Draws the random places, in ever smaller windows around a pixel's own.
        """
        wanted = torch.cat([_extract_patches(picture) @ self.basis, self.guide[0].flatten(1).T], dim=1)
        fixed_cost = self._update_usage_cost(places)
        cost = self._cost(wanted, places, fixed_cost)
        moves = [(0, step) for far in (4, 2, 1) for step in (far, -far)]
        moves += [move[::-1] for move in moves]
        reaches = [max(sides(self.exemplar)) // 4 // 3**power for power in range(4)]
        for move in (*moves, *reaches):
            if isinstance(move, tuple):
                candidate, factor = _propagate(places, self.here, sides(self.exemplar), *move), 1.0
            else:
                factor = JUMP_FACTOR
                jump = torch.randint(-move, move + 1, places.shape, generator=rng)
                candidate = _clamp(places + jump.to(places.device), sides(self.exemplar))
            candidate_cost = self._cost(wanted, candidate, fixed_cost)
            same_part = candidate[1] // self.part_width == places[1] // self.part_width
            better = (candidate_cost * factor < cost) & same_part
            places, cost = torch.where(better, candidate, places), torch.where(better, candidate_cost, cost)
        return places

    def _cost(self, wanted: Tensor, places: Tensor, fixed_cost: Tensor) -> Tensor:
        """Cost `[h, w]` of taking these places: the distance to what is wanted `[h·w, K]`, and the fixed cost."""
        index = _flat_index(places, sides(self.exemplar))
        # index_select copies whole rows, and the rest works in place: a third of the time of the plain expression.
        distance = self.patches.index_select(0, index).sub_(wanted).square_().sum(dim=1)
        return (distance + fixed_cost[index]).view(sides(places))

    def _update_usage_cost(self, places: Tensor) -> Tensor:
        """Cost `[N]` of each place of the exemplar: its own, and that of its usage, averaged with the last rounds'."""
        index = _flat_index(places, sides(self.exemplar))
        count = torch.bincount(index, minlength=len(self.cost)).view(1, 1, *sides(self.exemplar)).float()
        count = F.avg_pool2d(F.pad(count, [USAGE_WINDOW // 2] * 4, mode="replicate"), USAGE_WINDOW, 1)
        usage = count.flatten() * (len(self.cost) / len(index))
        self.usage = usage if self.usage is None else (self.usage + usage) / 2
        return USAGE_COST * self.usage + self.cost


def _positions(rows: Tensor, columns: Tensor) -> Tensor:
    """`[2, h, w]`: row and column of each pixel in these rows `[h]` and columns `[w]`."""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def _clamp(places: Tensor, size: tuple[int, int]) -> Tensor:
    """The places, with those outside an exemplar of some size moved to its border."""
    return torch.stack([places[0].clamp(0, size[0] - 1), places[1].clamp(0, size[1] - 1)])


def _flat_index(places: Tensor, size: tuple[int, int]) -> Tensor:
    return (places[0] * size[1] + places[1]).flatten()


def _propagate(places: Tensor, here: Tensor, size: tuple[int, int], down: int, right: int) -> Tensor:
    """For each pixel the place that continues the patch of the neighbour `down` rows and `right` columns away."""
    rows, columns = (
        (torch.arange(side, device=places.device) + step).clamp(0, side - 1)
        for side, step in zip(sides(places), (down, right), strict=True)
    )
    offsets = (places - here).index_select(1, rows).index_select(2, columns)
    return _clamp(offsets + here, size)


def _paint(exemplar: Tensor, places: Tensor, here: Tensor, side: int, mirrored: bool = False) -> Tensor:
    """The picture `[1, 3, h, w]` of overlapping patches of `side` pixels, averaged where they overlap."""
    height, width = sides(exemplar)
    size = (height, 2 * width if mirrored else width)
    places = _clamp(places, size)
    reach = range(-(side // 2), side // 2 + 1)
    pixels = exemplar[0].permute(1, 2, 0).flatten(0, 1)
    total = pixels.new_zeros(places[0].numel(), 3)
    for down in reach:
        for right in reach:
            rows, columns = _propagate(places, here, size, down, right)
            if mirrored:
                columns = torch.minimum(columns, 2 * width - 1 - columns)
            total += pixels.index_select(0, (rows * width + columns).flatten())
    return (total / side**2).T.reshape(1, 3, *sides(places))


def _extract_patches(picture: Tensor) -> Tensor:
    """The patch around every pixel: `[1, 3, h, w]` to `[h·w, 3·PATCH²]`."""
    return F.unfold(F.pad(picture, [PATCH // 2] * 4, mode="replicate"), PATCH)[0].T


def _reduce(x: Tensor, reduction: int) -> Tensor:
    """`[1, C, h, w]` made `reduction` times smaller."""
    height, width = sides(x)
    return resize(x, (max(1, height // reduction), max(1, width // reduction)))
