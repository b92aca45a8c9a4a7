"""Heat maps: similarity of places to a given one, and attention of the [CLS] token."""

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError
from ..images import enlarge, resize, sides
from ..matching.correspondence import Correspondence
from ..vit.backbone import Backbone, Request

MAP_PATCHES = 24
"""Patches along a picture's short side for a similarity map: smaller ones hold too little of a part to identify it."""

COARSE_SHARE = 0.75
"""The target is also searched with this share of its patches, at which objects of larger scale span as many patches."""

MAP_FACETS = (Request(-5, "key"), Request(-5, "token"), Request(-3, "key"), Request(-3, "token"))
"""What is compared: middle layers distinguish the parts of an object, the last ones only objects."""

COHERENCE = 2
"""Similarities are averaged with those of the neighbours up to this many patches away."""

MAP_DENSITY = 2
"""Cells of a similarity map per patch and axis."""

MASS = 0.6
"""Default share of the attention that a mask holds."""


@dataclass(frozen=True)
class SimilarityMap:
    """Similarity of every place of a batch of pictures to a selected one.

    Attributes:
        heat: `[B, 1, h, w]` on the grid of cells, mean cosines: 1 for equal places, about 0 for unrelated ones.
    """

    heat: Tensor

    def mask(self, size: tuple[int, int]) -> Tensor:
        """A soft mask `[B, 1, H, W]` of `size` = (height, width): 1 at the best match, 0 from cosine 0 down."""
        best = self.heat.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return enlarge(self.heat / best, size).clamp(0, 1)

    def best(self) -> Tensor:
        """The best match in each picture: `[B, 2]`, x and y as shares of width and height.

        Between the cells' centres it is the top of parabolas through the most similar cell and its neighbours.
        """
        height, width = sides(self.heat)
        index = self.heat.flatten(1).argmax(dim=1)
        row, column, batch = index // width, index % width, torch.arange(len(index), device=index.device)
        across = self.heat[batch, 0, row, _neighbours(column, width)]
        down = self.heat[batch, 0, _neighbours(row, height), column]
        x, y = column + 0.5 + _parabola_top(across), row + 0.5 + _parabola_top(down)
        return torch.stack([x / width, y / height], dim=1)


@dataclass(frozen=True)
class AttentionMap:
    """Attention of the [CLS] token to the patches.

    Attributes:
        heads: `[B, heads, h, w]` on the patch grid. With the attention to [CLS] and registers each head sums to 1.
    """

    heads: Tensor

    def heat(self, head: int | None = None) -> Tensor:
        """The map of one head, 0 the first, or the mean of all: `[B, 1, h, w]`.

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
        """The smallest set of pixels that holds a share of the attention on the patches.

        Args:
            size: (height, width) in pixels.
            mass: That share, above 0 and at most 1.
            head: As for `heat`.

        Returns:
            `[B, 1, H, W]`, 1 inside the set and 0 elsewhere.

        Raises:
            SpliceError: There is no such head, or the share is out of range.
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
    short_patches: int = MAP_PATCHES,
    radius: int = COHERENCE,
    density: int = MAP_DENSITY,
) -> SimilarityMap:
    """Computes how similar all places of some pictures are to one place, of the same or of other pictures.

    Args:
        source: `[B, 3, H, W]` in 0..1, the pictures that the place is in.
        where: A point (x, y), as shares of width and height, or a mask `[B, 1, H, W]` in 0..1 of any size.
        backbone: The ViT whose features are compared.
        target: `[B, 3, H', W']`, the pictures to search; None searches the sources. A batch of one source, mask or
            target is used with all of the others.
        short_patches: Patches along each picture's short side.
        radius: As for `Correspondence.similarity`.
        density: Cells per patch and axis, 1, 2 or 4: of 2 a place is found twice as exactly; the time grows with its
            square.

    Returns:
        One map for each target.

    Raises:
        SpliceError: Unknown density, batches of different sizes, a point outside the picture, or a mask that selects
            nothing.
    """
    target = source if target is None else target
    counts = {len(source), len(target), len(where) if isinstance(where, Tensor) else 1} - {1}
    if len(counts) > 1:
        raise SpliceError(f"cannot pair batches of {' and '.join(map(str, sorted(counts)))}: give one, or as many")
    heats = []
    # Consecutive masks of the same two pictures share their descriptors.
    for (i, j), group in groupby(range(max(counts, default=1)), lambda n: (n % len(source), n % len(target))):
        a, b = source[i : i + 1], target[j : j + 1]
        match = Correspondence.between(a, b, backbone, short_patches, MAP_FACETS, density=density, dense_target=True)
        coarse = match.retarget(b, backbone, max(1, round(COARSE_SHARE * short_patches)), MAP_FACETS)
        for n in group:
            mask = where[n % len(where)][None] if isinstance(where, Tensor) else _point_mask(where, match)
            heats.append(_search(match, coarse, mask.to(backbone.device, torch.float32), radius))
    return SimilarityMap(torch.cat(heats))


@torch.no_grad()
def attention_map(picture: Tensor, backbone: Backbone, layer: int = -1, size: int | None = None) -> AttentionMap:
    """Extracts the attention of the [CLS] token to the patches in one block.

    Args:
        picture: `[B, 3, H, W]` in 0..1.
        backbone: The ViT.
        layer: Index of the block, 0 the first, -1 the last.
        size: Short side in pixels to resize to; None keeps the pictures' own size.

    Raises:
        SpliceError: Unknown layer.
    """
    height, width = backbone.grid_size(*sides(picture), short=size)
    patches = backbone.cls_attention(picture.to(backbone.device), layer, size)[:, :, backbone.prefix :]
    return AttentionMap(patches.unflatten(-1, (height // backbone.patch, width // backbone.patch)))


def _search(match: Correspondence, coarse: Correspondence, mask: Tensor, radius: int) -> Tensor:
    """Similarity `[1, 1, h, w]` on the match's target grid: at each place the larger of those on two target grids."""
    selected = resize(mask, match.source_grid)
    if not selected.sum() > 0:
        raise SpliceError("the mask selects nothing: paint the place to search for in white")
    second = coarse.similarity(selected, radius)
    second = F.interpolate(second, match.target_grid, mode="bilinear", align_corners=False)
    return torch.maximum(match.similarity(selected, radius), second)


def _neighbours(index: Tensor, count: int) -> Tensor:
    """Indices `[3, B]`: the one before, `[B]` itself and the one after, of `count`; reflected at either end."""
    last = count - 1
    return torch.stack([(index - 1).abs().clamp(max=last), index, (last - (last - index - 1).abs()).clamp(min=0)])


def _parabola_top(values: Tensor) -> Tensor:
    """Where the parabolas through the values `[3, B]` at -1, 0 and 1, the largest at 0, have their tops: `[B]`."""
    before, here, after = values
    bend = before - 2 * here + after
    return torch.where(bend < 0, (before - after) / (2 * bend), 0)


def _point_mask(point: tuple[float, float], match: Correspondence) -> Tensor:
    """Weights `[1, 1, h, w]` on the source's grid: bilinear, over the cells whose centres surround a point."""
    x, y = point
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise SpliceError(f"the point {x:g}, {y:g} lies outside the picture: both shares must be from 0 to 1")
    rows, columns = (_linear_weights(share, count) for share, count in zip((y, x), match.source_grid, strict=True))
    return torch.outer(rows, columns)[None, None]


def _linear_weights(share: float, count: int) -> Tensor:
    """Weights `[count]` of linear interpolation at a share of the length of `count` cells, between their centres."""
    centre = min(max(share * count - 0.5, 0), count - 1)
    return (1 - (torch.arange(count) - centre).abs()).clamp_min(0)
