"""Heat maps: which places are like a given one, and where a ViT attends."""

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, Request
from .components import enlarge
from .correspondence import Correspondence
from .errors import SpliceError
from .images import resize, sides

SHORT_PATCHES = 24
"""Patches along the short side for a similarity map: finer ones see too little of a part to know it again."""

NEARER = 0.75
"""The target is searched at this share of its patches as well: a thing seen from nearer then takes as many of them."""

DESCRIBED = (Request(-5, "key"), Request(-5, "token"), Request(-3, "key"), Request(-3, "token"))
"""What says how alike two places are: the middle layers tell a thing's parts apart, the last ones only the things."""

COHERENCE = 2
"""Patches whose neighbours vote on how alike two places are."""

MASS = 0.6
"""Share of the attention that a mask keeps."""


@dataclass(frozen=True)
class SimilarityMap:
    """How alike every place of some pictures is to a chosen one.

    Attributes:
        heat: `[B, 1, h, w]` on the patch grid, mean cosines; 1 is the same, 0 as alike as chance.
    """

    heat: Tensor

    def mask(self, size: tuple[int, int]) -> Tensor:
        """A soft mask `[B, 1, H, W]` of `size` = (height, width): 1 at the best match, 0 where nothing is alike."""
        best = self.heat.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return enlarge(self.heat / best, size).clamp(0, 1)

    def best(self) -> Tensor:
        """The best matching place of each picture: `[B, 2]`, x and y as shares of its width and height."""
        height, width = sides(self.heat)
        index = self.heat.flatten(1).argmax(dim=1)
        return torch.stack([(index % width + 0.5) / width, (index // width + 0.5) / height], dim=1)


@dataclass(frozen=True)
class AttentionMap:
    """Where the [CLS] token attends.

    Attributes:
        heads: `[B, heads, h, w]` on the patch grid. What a head lacks to a sum of 1 goes to [CLS] and registers.
    """

    heads: Tensor

    def heat(self, head: int | None = None) -> Tensor:
        """The map of one head, counted from 0, or the mean of all: `[B, 1, h, w]`.

        Raises:
            SpliceError: There is no such head.
        """
        count = self.heads.shape[1]
        if head is None:
            return self.heads.mean(dim=1, keepdim=True)
        if not 0 <= head < count:
            raise SpliceError(f"there are {count} heads: head must be from 0 to {count - 1}, not {head}")
        return self.heads[:, head : head + 1]

    def mask(self, size: tuple[int, int], mass: float = MASS, head: int | None = None) -> Tensor:
        """The fewest pixels that hold a share of the attention on the patches.

        Args:
            size: (height, width) in pixels.
            mass: That share, above 0 and at most 1.
            head: As for `heat`.

        Returns:
            `[B, 1, H, W]`, 1 where kept and 0 elsewhere.

        Raises:
            SpliceError: There is no such head, or no such share.
        """
        if not 0 < mass <= 1:
            raise SpliceError(f"the kept mass must be above 0 and at most 1, not {mass:g}")
        flat = enlarge(self.heat(head), size).clamp_min(0).flatten(1).cpu().double()
        ordered, order = flat.sort(dim=1, descending=True)
        before = ordered.cumsum(dim=1) - ordered
        kept = before < mass * ordered.sum(dim=1, keepdim=True)
        mask = torch.zeros_like(flat).scatter(1, order, kept.double())
        return mask.view(-1, 1, *size).to(self.heads)


@torch.no_grad()
def similarity_map(
    source: Tensor,
    where: tuple[float, float] | Tensor,
    backbone: Backbone,
    target: Tensor | None = None,
    short_patches: int = SHORT_PATCHES,
    radius: int = COHERENCE,
) -> SimilarityMap:
    """Finds what is like a place of one picture, on the same or on other pictures.

    Args:
        source: `[B, 3, H, W]` in 0..1, the pictures that the place is in.
        where: A point (x, y), as shares of width and height, or a mask `[B, 1, H, W]` in 0..1 of any size.
        backbone: The ViT that sees them.
        target: `[B, 3, H', W']`, the pictures to search; None searches the sources. Of sources, masks and targets,
            one serves for all of the others.
        short_patches: Patches along each picture's short side; the map has those of the target.
        radius: Neighbours this many patches away vote along.

    Returns:
        One map for each target.

    Raises:
        SpliceError: The point lies outside of the picture, or the mask selects nothing.
    """
    target = source if target is None else target
    counts = {len(source), len(target), len(where) if isinstance(where, Tensor) else 1} - {1}
    if len(counts) > 1:
        raise SpliceError(f"cannot pair batches of {' and '.join(map(str, sorted(counts)))}: give one, or as many")
    heats = []
    # Many masks may ask about the same two pictures: those are looked at once.
    for (i, j), group in groupby(range(max(counts, default=1)), lambda n: (n % len(source), n % len(target))):
        a, b = source[i : i + 1], target[j : j + 1]
        match = Correspondence.between(a, b, backbone, short_patches, DESCRIBED)
        nearer = match.retarget(b, backbone, max(1, round(NEARER * short_patches)), DESCRIBED)
        for n in group:
            mask = where[n % len(where)][None] if isinstance(where, Tensor) else _point_mask(where, match)
            heats.append(_search(match, nearer, mask.to(backbone.device, torch.float32), radius))
    return SimilarityMap(torch.cat(heats))


@torch.no_grad()
def attention_map(picture: Tensor, backbone: Backbone, layer: int = -1, size: int | None = None) -> AttentionMap:
    """Reads off where the [CLS] token attends in one block.

    Args:
        picture: `[B, 3, H, W]` in 0..1.
        backbone: The ViT.
        layer: Index of the block, 0 the first, -1 the last.
        size: Short side in pixels to resize to; None keeps the pictures' own size.

    Raises:
        SpliceError: Unknown layer.
    """
    height, width = backbone.grid_size(*sides(picture), short=size)
    attention = backbone.attention(picture.to(backbone.device), layer, size)
    patches = attention[:, :, 0, backbone.prefix :]
    return AttentionMap(patches.unflatten(-1, (height // backbone.patch, width // backbone.patch)))


def _search(match: Correspondence, nearer: Correspondence, mask: Tensor, radius: int) -> Tensor:
    """`[1, 1, h, w]` on the match's target grid: how alike each place is at the better of two sizes of the target."""
    selected = resize(mask, match.source_grid)
    if not selected.sum() > 0:
        raise SpliceError("the mask selects nothing: paint the place to look for in white")
    coarse = nearer.similarity(selected, radius)
    coarse = F.interpolate(coarse, match.target_grid, mode="bilinear", align_corners=False)
    return torch.maximum(match.similarity(selected, radius), coarse)


def _point_mask(point: tuple[float, float], match: Correspondence) -> Tensor:
    """`[1, 1, h, w]` on the source's grid: a weight of 1 shared by the patches whose centres surround a point."""
    x, y = point
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise SpliceError(f"the point {x:g}, {y:g} lies outside of the picture: both shares must be from 0 to 1")
    rows, columns = (_tent(share, count) for share, count in zip((y, x), match.source_grid, strict=True))
    return torch.outer(rows, columns)[None, None]


def _tent(share: float, count: int) -> Tensor:
    """Weights `[count]` of linear interpolation between the centres of so many patches in a row."""
    centre = min(max(share * count - 0.5, 0), count - 1)
    return (1 - (torch.arange(count) - centre).abs()).clamp_min(0)
