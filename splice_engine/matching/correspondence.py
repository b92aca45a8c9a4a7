"""Semantic correspondence: which patch of one picture matches which of another, by the ViT's features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..vit.backbone import Backbone, Request
from .descriptors import MATCH_FACETS, MATCH_PATCHES, covered_cells, describe, working_size
from .filters import box_mean

TEMPERATURE = 0.03
"""Of the softmax over cosines."""

LOCAL_SCALING = 0.75
"""Share of a target cell's crowding that is taken off its similarities, as in cross-domain similarity local scaling
(Conneau et al., 2018, with 0.5). Without it a few cells of the target that are near to much of the source take also the
matches of what is special there: a nose would match the fur around the other one."""

PAINTED_SHARE = 1 / 4
"""Share of the painted picture's descriptors beside the source's: with more, an eye that was painted twice is found
twice."""

MIRROR_PATCHES = 6
"""Patches around a place over which it is decided whether the target or its mirror image is matched: where neither is
better, as in the grain of wood, they must not alternate."""

CROWDING_PATCHES = 3
"""Patches of the source, those nearest to a cell of the target, to which its mean similarity is its crowding."""

WHOLE_ENTRIES, CHUNK_ENTRIES = 2**25, 2**24
"""Most similarities that are kept in memory; where there are more, most that are computed at a time."""

BAND_ENTRIES = 2**22
"""Similarities, of those that are kept, that are averaged at a time: they stay in a processor's cache, which takes a
third of the time."""


@dataclass(frozen=True)
class Correspondence:
    """A semantic map from the patches of a source picture to those of a target picture.

    Attributes:
        source: `[N, D]`, descriptors of the source's cells, row by row over its grid.
        target: `[M, D]`, unit descriptors of the target's.
        source_grid: (h, w) of the source in cells; N = h·w.
        target_grid: Likewise of the target.
        matchable: `[M]` booleans, the target's cells that may be matched; None is all of them.
        density: Cells per patch and axis.
    """

    source: Tensor
    target: Tensor
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    matchable: Tensor | None = None
    density: int = 1

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        source: Tensor,
        target: Tensor,
        backbone: Backbone,
        short_patches: int = MATCH_PATCHES,
        requests: Sequence[Request] = MATCH_FACETS,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        density: int = 1,
        dense_target: bool = False,
    ) -> "Correspondence":
        """Extracts descriptors of two pictures, or of what masks cover of them, to match them.

        Args:
            source: `[1, 3, H, W]` in 0..1.
            target: Likewise, of any size.
            backbone: The ViT whose features are compared.
            short_patches: Patches along each picture's short side; along the long side there are at most twice as many.
            requests: The facets whose cosine similarities are averaged.
            source_mask: `[1, 1, H, W]` in 0..1, of any size: the object to match. Patches outside it get a match all
                the same.
            target_mask: Likewise: patches that it does not cover are never matched. With both masks, descriptors are
                centred on the mean of the patches that the mask covers, otherwise on the mean of the whole picture.
            density: Cells per patch and axis, 1, 2 or 4. The source's descriptors are extracted on a grid so much
                finer at the same scale, in which parts as small as a patch show; the target's are interpolated.
                The time grows with its square.
            dense_target: The target's descriptors are extracted as finely too, for a map of it.

        Raises:
            SpliceError: Unknown density, a mask of the wrong shape or values, or one that selects nothing.
        """
        a_size, b_size = (working_size(picture, backbone, short_patches) for picture in (source, target))
        a_grid, b_grid = (
            (size[0] // backbone.patch * density, size[1] // backbone.patch * density) for size in (a_size, b_size)
        )
        a_covered = covered_cells(source_mask, "source mask", a_grid, backbone)
        b_covered = covered_cells(target_mask, "target mask", b_grid, backbone)
        both = a_covered is not None and b_covered is not None
        return cls(
            describe(source, backbone, a_size, a_grid, requests, a_covered if both else None, density),
            describe(
                target, backbone, b_size, b_grid, requests, b_covered if both else None, density if dense_target else 1
            ),
            a_grid,
            b_grid,
            b_covered,
            density,
        )

    @torch.no_grad()
    def retarget(
        self, target: Tensor, backbone: Backbone, short_patches: int, requests: Sequence[Request] = MATCH_FACETS
    ) -> "Correspondence":
        """The same source with another target, or with the same one at another size; arguments as for `between`."""
        size = working_size(target, backbone, short_patches)
        grid = (size[0] // backbone.patch * self.density, size[1] // backbone.patch * self.density)
        descriptors = describe(target, backbone, size, grid, requests, None)
        return Correspondence(self.source, descriptors, self.source_grid, grid, density=self.density)

    @torch.no_grad()
    def refine(
        self,
        painted: Tensor,
        backbone: Backbone,
        requests: Sequence[Request] = MATCH_FACETS,
        mask: Tensor | None = None,
    ) -> "Correspondence":
        """The map for a mean of the source's descriptors and those of the source painted with the target's pixels.

        The painted source shares the target's appearance, so that its features distinguish parts which those of the
        source alone confuse.

        Args:
            painted: `[1, 3, H, W]` in 0..1, the picture that was painted by this map; of any size.
            backbone: The ViT, as for `between`.
            requests: The facets, as for `between`.
            mask: `[1, 1, H, W]` in 0..1: the source mask of `between`, where there was a target mask too.

        Raises:
            SpliceError: A mask of the wrong shape or values, or one that selects nothing.
        """
        patches = (self.source_grid[0] // self.density, self.source_grid[1] // self.density)
        size = (patches[0] * backbone.patch, patches[1] * backbone.patch)
        centre = covered_cells(mask, "source mask", self.source_grid, backbone)
        descriptors = describe(painted, backbone, size, self.source_grid, requests, centre, self.density)
        return replace(self, source=torch.lerp(self.source, descriptors, PAINTED_SHARE))

    def warp(self, values: Tensor, temperature: float = TEMPERATURE) -> Tensor:
        """Warps values from the target's grid to the source's: each source patch gets a mean over its matches.

        Args:
            values: `[1, C, h', w']` on the target's grid.
            temperature: Of the softmax over the target's patches: the lower, the fewer have a weight.

        Returns:
            `[1, C, h, w]` on the source's grid.
        """
        flat = values.flatten(2)[0].T
        warped = torch.cat([shares @ flat for shares in self._shares(temperature)])
        return warped.T.reshape(1, -1, *self.source_grid)

    def usage(self, temperature: float = TEMPERATURE) -> Tensor:
        """How much each target cell is matched by all source cells together, `[M]`; arguments as for `warp`."""
        return torch.stack([shares.sum(dim=0) for shares in self._shares(temperature)]).sum(dim=0)

    def _shares(self, temperature: float) -> Iterator[Tensor]:
        """Softmax weights of the target's cells `[n, M]`, for some of the source's at a time."""
        step = max(1, CHUNK_ENTRIES // len(self.target))
        for first in range(0, len(self.source), step):
            similarity = self.source[first : first + step] @ self.target.T
            yield self._exclude_unmatchable(similarity / temperature).softmax(dim=-1)

    def matches(self, radius: int = 0, mirror: bool = False) -> Tensor:
        """The best match of each source cell.

        Args:
            radius: Similarities are averaged with those of the neighbours up to this many patches away, each compared
                with the same neighbour of the target, so that adjacent cells get adjacent matches.
            mirror: The target's mirror image stands to the right of the target, and regions to which it is nearer are
                matched with it: a head that faces the other way finds its parts in their order.

        Returns:
            `[2, h, w]` integers: row and column in the target's grid, columns from its width on in the mirror image.
        """
        width = self.target_grid[1]
        crowding = LOCAL_SCALING * self.crowding.view(self.target_grid)
        bands = [
            [self._exclude_unmatchable(volume.flatten(2)).max(dim=-1) for volume in volumes]
            for _, volumes in self._volumes(radius, mirror, crowding=crowding)
        ]
        vars(self).pop("_whole", None)  # refinement keeps the map, but needs all similarities no more
        (plain, place), *mirrored = (
            [torch.cat(parts) for parts in zip(*of_bands, strict=True)] for of_bands in zip(*bands, strict=True)
        )
        row, column = place // width, place % width
        for best, place in mirrored:
            gain = box_mean((best - plain)[None, None], MIRROR_PATCHES * self.density)[0, 0]
            row = torch.where(gain > 0, place // width, row)
            column = torch.where(gain > 0, 2 * width - 1 - place % width, column)
        return torch.stack([row, column])

    @cached_property
    def crowding(self) -> Tensor:
        """`[M]`, mean similarity of each target cell to the cells of the source that are nearest to it."""
        count = min(CROWDING_PATCHES * self.density**2, len(self.source))
        if self._whole is not None:
            return self._whole.topk(count, dim=0).values.mean(dim=0)
        parts = self.target.split(max(1, CHUNK_ENTRIES // len(self.source)))
        return torch.cat([(part @ self.source.T).topk(count).values.mean(dim=1) for part in parts])

    def similarity(self, selected: Tensor, radius: int = 0) -> Tensor:
        """Similarity of each target patch to some patches of the source.

        Args:
            selected: `[1, 1, h, w]` on the source's grid, the weight of each patch; at least one above 0.
            radius: As for `matches`; of the target as it is and mirrored the more similar one counts.

        Returns:
            `[1, 1, h', w']` on the target's grid: weighted means of cosines, about 0 for unrelated places.
        """
        weights = selected[0, 0] / selected.sum()
        occupied = weights.any(dim=1).nonzero()
        rows_used = range(int(occupied.min()), int(occupied.max()) + 1)
        parts = [
            torch.stack([torch.tensordot(weights[rows], volume, dims=2) for volume in volumes])
            for rows, volumes in self._volumes(radius, True, rows_used)
        ]
        return torch.stack(parts).sum(dim=0).amax(dim=0)[None, None]

    def _volumes(
        self, radius: int, mirror: bool, rows: range | None = None, crowding: Tensor | float = 0.0
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Similarities averaged over neighbours, `[rows, w, h', w']`, a band of rows of the source at a time.

        Args:
            radius: As for `matches`.
            mirror: Whether those come too for which the neighbour to the right is compared with the target's to the
                left.
            rows: The rows of the source that are needed; None is all of them.
            crowding: `[h', w']`, taken off the similarities before they are averaged.
        """
        height, width = self.source_grid
        reach = radius * self.density
        for top, bottom in self._bands(reach, range(height) if rows is None else rows):
            first, last = max(0, top - reach), min(height, bottom + reach)
            similarity = self._similarities(first * width, last * width)
            by_row = _diagonal_mean(
                similarity.view(last - first, width, *self.target_grid) - crowding, 0, radius, self.density
            )
            by_row = by_row[top - first : bottom - first]
            volumes = [_diagonal_mean(by_row, 1, radius, self.density)]
            if mirror:
                volumes.append(_diagonal_mean(by_row, 1, radius, self.density, mirrored=True))
            yield slice(top, bottom), volumes

    @cached_property
    def _whole(self) -> Tensor | None:
        """All similarities `[N, M]`, of which both crowding and matches are made, where so many may be in memory."""
        return self.source @ self.target.T if len(self.source) * len(self.target) <= WHOLE_ENTRIES else None

    def _similarities(self, first: int, last: int) -> Tensor:
        """Those of some of the source's cells, in their order, `[last - first, M]`."""
        return self.source[first:last] @ self.target.T if self._whole is None else self._whole[first:last]

    def _exclude_unmatchable(self, similarity: Tensor) -> Tensor:
        """Similarities `[..., M]` with minus infinity for the target patches that may not be matched."""
        return similarity if self.matchable is None else similarity.masked_fill(~self.matchable, -torch.inf)

    def _bands(self, reach: int, rows: range) -> Iterator[tuple[int, int]]:
        """First and last + 1 row of each band, which with its neighbours has no more entries than the constants say."""
        most = CHUNK_ENTRIES if self._whole is None else BAND_ENTRIES
        step = max(1, most // (self.source_grid[1] * len(self.target)) - 2 * reach)
        for top in range(rows.start, rows.stop, step):
            yield top, min(top + step, rows.stop)


def _diagonal_mean(volume: Tensor, axis: int, radius: int, stride: int, mirrored: bool = False) -> Tensor:
    """Mean of `[h, w, h', w']` over `radius` equal steps of a stride along one axis of source and target, both ways.

    Mirrored, each step along the source's axis is one back along the target's.
    """
    if not radius:
        return volume
    total = torch.zeros_like(volume)
    # How many there are depends on the places along this axis alone.
    count = volume.new_zeros([side if index % 2 == axis else 1 for index, side in enumerate(volume.shape)])
    for step in range(-radius * stride, radius * stride + 1, stride):
        here: list[slice] = [slice(None)] * 4
        there = here.copy()
        for side, shift in ((axis, step), (axis + 2, -step if mirrored else step)):
            length = volume.shape[side]
            here[side] = slice(max(0, -shift), max(0, length - max(0, shift)))
            there[side] = slice(max(0, shift), max(0, length - max(0, -shift)))
        if volume[tuple(here)].numel():
            total[tuple(here)] += volume[tuple(there)]
            count[tuple(here)] += 1
    return total.div_(count)
