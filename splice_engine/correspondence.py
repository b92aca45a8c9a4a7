"""Which patch of one picture belongs to which patch of another, by what a ViT sees in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, Request
from .images import resize, sides

SHORT_PATCHES = 32
"""Patches along the short side."""

MATCHED = (Request(-3, "key"), Request(-3, "token"), Request(-2, "token"), Request(-1, "key"))
"""What is compared: keys of a middle layer tell parts apart, deeper tokens objects from ground; either alone errs."""

TEMPERATURE = 0.03
CHUNK_ENTRIES = 2**24
"""Most similarities in memory at a time."""


@dataclass(frozen=True)
class Correspondence:
    """A semantic map from the patches of a source picture to those of a target picture.

    Attributes:
        source: `[N, D]`, unit descriptors of the source's patches, row by row over its grid.
        target: `[M, D]`, likewise of the target's.
        source_grid: (h, w) of the source in patches; N = h·w.
        target_grid: Likewise of the target.
    """

    source: Tensor
    target: Tensor
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        source: Tensor,
        target: Tensor,
        backbone: Backbone,
        short_patches: int = SHORT_PATCHES,
        requests: Sequence[Request] = MATCHED,
    ) -> "Correspondence":
        """Matches two pictures.

        Args:
            source: `[1, 3, H, W]` in 0..1.
            target: Likewise, of any size.
            backbone: The ViT that sees them.
            short_patches: Patches along each picture's short side; along the long side there are at most twice as many.
            requests: The facets whose cosine similarities are averaged.
        """
        (a, a_grid), (b, b_grid) = (
            _describe(picture, backbone, short_patches, requests) for picture in (source, target)
        )
        return cls(a, b, a_grid, b_grid)

    def warp(self, values: Tensor, temperature: float = TEMPERATURE) -> Tensor:
        """Carries values from the target's patches to the source's, each source patch taking a mean over its matches.

        Args:
            values: `[1, C, h', w']` on the target's grid.
            temperature: Of the softmax over the target's patches; the lower, the fewer take part.

        Returns:
            `[1, C, h, w]` on the source's grid.
        """
        flat = values.flatten(2)[0].T
        rows = self.source.split(max(1, CHUNK_ENTRIES // len(self.target)))
        warped = [(part @ self.target.T / temperature).softmax(dim=-1) @ flat for part in rows]
        return torch.cat(warped).T.reshape(1, -1, *self.source_grid)

    def matches(self, radius: int = 0) -> Tensor:
        """The best match of each source patch.

        Args:
            radius: Neighbours this many patches away vote along: a match is the better, the better they match the
                neighbours of its target. It makes matches of adjacent patches adjacent.

        Returns:
            `[2, h, w]` integers: row and column in the target's grid.
        """
        height, width = self.source_grid
        best = []
        for top, bottom in self._bands(radius):
            first, last = max(0, top - radius), min(height, bottom + radius)
            similarity = self.source[first * width : last * width] @ self.target.T
            volume = similarity.view(last - first, width, *self.target_grid)
            volume = _diagonal_mean(_diagonal_mean(volume, 0, radius), 1, radius)
            best.append(volume[top - first : bottom - first].flatten(2).argmax(dim=-1))
        index = torch.cat(best)
        return torch.stack([index // self.target_grid[1], index % self.target_grid[1]])

    def _bands(self, radius: int) -> Iterator[tuple[int, int]]:
        height, width = self.source_grid
        rows = max(1, CHUNK_ENTRIES // (width * len(self.target)) - 2 * radius)
        for top in range(0, height, rows):
            yield top, min(top + rows, height)


def _describe(
    picture: Tensor, backbone: Backbone, short_patches: int, requests: Sequence[Request]
) -> tuple[Tensor, tuple[int, int]]:
    """Descriptors `[N, D]` whose dot product is the mean cosine over the requests, and the grid.

    The picture and its mirror image are described together: position leaves less of a trace, and the descriptors of a
    mirrored picture are the mirrored descriptors.
    """
    short = short_patches * backbone.patch
    height, width = backbone.grid_size(*sides(picture), short=short, longest=2 * short)
    grid = height // backbone.patch, width // backbone.patch
    picture = resize(picture.to(backbone.device), (height, width))
    answer = backbone(torch.cat([picture, picture.flip(-1)]), requests)
    parts = []
    for request in requests:
        tokens = answer[request][:, backbone.prefix :].unflatten(1, grid)
        tokens = (tokens[0] + tokens[1].flip(1)).flatten(0, 1)
        parts.append(F.normalize(tokens - tokens.mean(dim=0), dim=-1))
    return torch.cat(parts, dim=-1) / len(requests) ** 0.5, grid


def _diagonal_mean(volume: Tensor, axis: int, radius: int) -> Tensor:
    """Mean of `[h, w, h', w']` over steps taken at once along one axis of the source and that of the target."""
    if not radius:
        return volume
    total, count = torch.zeros_like(volume), torch.zeros_like(volume)
    for step in range(-radius, radius + 1):
        here: list[slice] = [slice(None)] * 4
        there = here.copy()
        for side in (axis, axis + 2):
            length = volume.shape[side]
            here[side] = slice(max(0, -step), length - max(0, step))
            there[side] = slice(max(0, step), length - max(0, -step))
        if volume[tuple(here)].numel():
            total[tuple(here)] += volume[tuple(there)]
            count[tuple(here)] += 1
    return total / count
