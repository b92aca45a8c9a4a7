"""Which patch of one picture belongs to which patch of another, by what a ViT sees in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, Request
from .images import check_mask, resize, sides
from .masks import covered_patches

SHORT_PATCHES = 28
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
        source: `[N, D]`, descriptors of the source's patches, row by row over its grid.
        target: `[M, D]`, unit descriptors of the target's.
        source_grid: (h, w) of the source in patches; N = h·w.
        target_grid: Likewise of the target.
        matchable: `[M]` booleans, the target's patches that may be matched; None is all of them.
    """

    source: Tensor
    target: Tensor
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    matchable: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        source: Tensor,
        target: Tensor,
        backbone: Backbone,
        short_patches: int = SHORT_PATCHES,
        requests: Sequence[Request] = MATCHED,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> "Correspondence":
        """Matches two pictures, or what masks cover of them.

        Args:
            source: `[1, 3, H, W]` in 0..1.
            target: Likewise, of any size.
            backbone: The ViT that sees them.
            short_patches: Patches along each picture's short side; along the long side there are at most twice as many.
            requests: The facets whose cosine similarities are averaged.
            source_mask: `[1, 1, H, W]` in 0..1, of any size: the object whose matches count. Patches outside it get
                a match all the same.
            target_mask: Likewise: patches that it does not cover are never matched. With both masks, object is matched
                with object: descriptors are differences from the mean of the patches that their own mask covers, and
                else from the mean of the whole picture.

        Raises:
            SpliceError: A mask that cannot be worked with.
        """
        a_size, b_size = (_working_size(picture, backbone, short_patches) for picture in (source, target))
        a_covered = _covered(source_mask, "source mask", a_size, backbone)
        b_covered = _covered(target_mask, "target mask", b_size, backbone)
        both = a_covered is not None and b_covered is not None
        return cls(
            _describe(source, backbone, a_size, requests, a_covered if both else None),
            _describe(target, backbone, b_size, requests, b_covered if both else None),
            (a_size[0] // backbone.patch, a_size[1] // backbone.patch),
            (b_size[0] // backbone.patch, b_size[1] // backbone.patch),
            b_covered,
        )

    @torch.no_grad()
    def retarget(
        self, target: Tensor, backbone: Backbone, short_patches: int, requests: Sequence[Request] = MATCHED
    ) -> "Correspondence":
        """The same source matched to another target, or to the same one at another size; arguments as for `between`."""
        size = _working_size(target, backbone, short_patches)
        described = _describe(target, backbone, size, requests, None)
        grid = (size[0] // backbone.patch, size[1] // backbone.patch)
        return Correspondence(self.source, described, self.source_grid, grid)

    @torch.no_grad()
    def second_look(
        self, painted: Tensor, backbone: Backbone, requests: Sequence[Request] = MATCHED, mask: Tensor | None = None
    ) -> "Correspondence":
        """The same map by the mean of two similarities: the source's, and that of the source in the target's look.

        Where both pictures have one look, the ViT tells parts apart that it had mixed up.

        Args:
            painted: `[1, 3, H, W]` in 0..1, the source as this map painted it; of any size.
            backbone: The ViT that sees it.
            requests: The facets, as for `between`.
            mask: `[1, 1, H, W]` in 0..1: the source mask of `between`, where there was a target mask too.
        """
        size = (self.source_grid[0] * backbone.patch, self.source_grid[1] * backbone.patch)
        centre = _covered(mask, "source mask", size, backbone)
        return replace(self, source=(self.source + _describe(painted, backbone, size, requests, centre)) / 2)

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
        warped = [self._allowed(part @ self.target.T / temperature).softmax(dim=-1) @ flat for part in rows]
        return torch.cat(warped).T.reshape(1, -1, *self.source_grid)

    def matches(self, radius: int = 0) -> Tensor:
        """The best match of each source patch.

        Args:
            radius: Neighbours this many patches away vote along: a match is the better, the better they match the
                neighbours of its target. It makes matches of adjacent patches adjacent.

        Returns:
            `[2, h, w]` integers: row and column in the target's grid.
        """
        best = [self._allowed(volume.flatten(2)).argmax(dim=-1) for _, volume in self._volumes(radius)]
        index = torch.cat(best)
        return torch.stack([index // self.target_grid[1], index % self.target_grid[1]])

    def similarity(self, selected: Tensor, radius: int = 0) -> Tensor:
        """How alike each target patch is to some patches of the source.

        Args:
            selected: `[1, 1, h, w]` on the source's grid, the weight of each patch; at least one above 0.
            radius: Neighbours that vote along, as for `matches`; the target may also show the thing mirrored.

        Returns:
            `[1, 1, h', w']` on the target's grid, weighted means of cosines; 0 is as alike as chance.
        """
        weights = selected[0, 0] / selected.sum()
        chosen = weights.any(dim=1).nonzero()
        only = range(int(chosen.min()), int(chosen.max()) + 1)
        ways = []
        for mirrored in (False, True):
            volumes = self._volumes(radius, mirrored, only)
            parts = [torch.tensordot(weights[rows], part, dims=2) for rows, part in volumes]
            ways.append(torch.stack(parts).sum(dim=0))
        return torch.maximum(*ways)[None, None]

    def _volumes(
        self, radius: int, mirrored: bool = False, only: range | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Similarities `[rows, w, h', w']` with the neighbours' votes, for some rows of the source, or all, at a time.

        With `mirrored` the neighbour to the right votes for what is to the left in the target.
        """
        height, width = self.source_grid
        for top, bottom in self._bands(radius, range(height) if only is None else only):
            first, last = max(0, top - radius), min(height, bottom + radius)
            similarity = self.source[first * width : last * width] @ self.target.T
            volume = similarity.view(last - first, width, *self.target_grid)
            volume = volume.flip(-1) if mirrored else volume
            volume = _diagonal_mean(_diagonal_mean(volume, 0, radius), 1, radius)
            volume = volume.flip(-1) if mirrored else volume
            yield slice(top, bottom), volume[top - first : bottom - first]

    def _allowed(self, similarity: Tensor) -> Tensor:
        """`[..., M]` with minus infinity for the patches that may not be matched."""
        return similarity if self.matchable is None else similarity.masked_fill(~self.matchable, -torch.inf)

    def _bands(self, radius: int, wanted: range) -> Iterator[tuple[int, int]]:
        rows = max(1, CHUNK_ENTRIES // (self.source_grid[1] * len(self.target)) - 2 * radius)
        for top in range(wanted.start, wanted.stop, rows):
            yield top, min(top + rows, wanted.stop)


def _working_size(picture: Tensor, backbone: Backbone, short_patches: int) -> tuple[int, int]:
    short = short_patches * backbone.patch
    return backbone.grid_size(*sides(picture), short=short, longest=2 * short)


def _covered(mask: Tensor | None, name: str, size: tuple[int, int], backbone: Backbone) -> Tensor | None:
    return None if mask is None else covered_patches(check_mask(mask, name).to(backbone.device), size, backbone.patch)


def _describe(
    picture: Tensor, backbone: Backbone, size: tuple[int, int], requests: Sequence[Request], centre: Tensor | None
) -> Tensor:
    """Descriptors `[N, D]` whose dot product is the mean cosine over the requests, centred on some of the patches.

    The picture and its mirror image are described together: position leaves less of a trace, and the descriptors of a
    mirrored picture are the mirrored descriptors.
    """
    picture = resize(picture.to(backbone.device), size)
    answer = backbone(torch.cat([picture, picture.flip(-1)]), requests)
    parts = []
    for request in requests:
        tokens = answer[request][:, backbone.prefix :].unflatten(1, (size[0] // backbone.patch, -1))
        tokens = (tokens[0] + tokens[1].flip(1)).flatten(0, 1)
        mean = (tokens if centre is None else tokens[centre]).mean(dim=0)
        parts.append(F.normalize(tokens - mean, dim=-1))
    return torch.cat(parts, dim=-1) / len(requests) ** 0.5


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
