"""Guided patch synthesis: finds the patches of an exemplar to paint a picture with.

Image analogies (Hertzmann et al., 2001), searched by PatchMatch (Barnes et al., 2009) from coarse to fine: each pixel
takes the patch that is nearest in the guides' descriptors and in the colours painted so far. A patch costs the more,
the more it is used (Kaspar et al., 2015); otherwise a few smooth patches would be spread over the whole picture. Small
things in a colour of their own cost most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, sides
from .filters import to_grey
from .painting import clamp_places, paint_patches, positions, propagate, reduce

PATCH = 5
"""Side in pixels of the patches that are compared."""

PATCH_COMPONENTS = 16
"""Principal components of a patch's colours that are compared."""

USAGE_COST = 0.03
"""Cost of a patch that is used as often as the average one; as much as a difference of 0.1 in each channel."""

BORDER_COST = 4.0
"""Cost of the outermost places of the exemplar: their patches reach out of it, and many a picture has a dark rim, which
would be painted as lines where nothing speaks for any place."""

USAGE_WINDOW = 9
"""Side in pixels of the squares over which usage is averaged."""

ACCENT_COST, ACCENT_USES = 40.0, 1.5
"""Cost of each use of an accent past these many, per difference of its colour from that around it, see
`find_accents`. In a close-up of a swan the beak of a smaller one stays red all the same: there the descriptors speak
for it."""

ACCENT_FAINT = 0.1
"""Difference of colours up to which there is none: grain and the shades of a backdrop are no accents."""

ACCENT_SCALE, ACCENT_WINDOW = 4, 5
"""Scale in pixels of the search at which accents are sought, and the pixels there that are around one: what covers more
than half of them is a part, and no accent."""

JUMP_FACTOR = 1.5
"""What a patch found at random has to undercut: the cost so far divided by this. Patches that continue their
neighbours' are preferred (Ashikhmin, 2001), so that B's texture comes in pieces and not in shreds."""

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
    usage_factor: Tensor | None = None,
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
        usage_factor: `[1, 1, H, W]`, by which the cost of a patch's usage is multiplied at each place to paint; None is
            by 1.

    Returns:
        `[2, H, W]`, for each pixel the offset (rows, columns) in pixels to its patch in the exemplar. The search is
        deterministic: it has a random source of its own.
    """
    rng = torch.Generator().manual_seed(0)
    offsets = start.float()
    border = BORDER_COST * _border(exemplar, parts=2 if mirrored else 1)
    cost = border if cost is None else cost + border
    accents = find_accents(exemplar)
    usage_factor = torch.ones_like(guide[:, :1]) if usage_factor is None else usage_factor
    for reduction, rounds in SEARCH_LEVELS:
        pictures = (exemplar, guide, exemplar_guide, cost, accents, usage_factor)
        level = _Level(mirrored, *(reduce(x, reduction) for x in pictures))
        wide = F.interpolate(offsets[None], sides(level.guide), mode="nearest")[0]
        places = clamp_places(level.here + (wide / reduction).round().long(), sides(level.exemplar))
        for _ in range(rounds):
            places = level.search(places, paint_patches(level.exemplar, places, level.here, PATCH), rng)
        offsets = (places - level.here).float() * reduction
    return offsets


class _Level:
    """One level of the pyramid: the patches of the exemplar, and the search among them.

    A field of places `[2, h, w]` holds for each pixel of the picture the row and column of its patch's centre in the
    exemplar.
    """

    def __init__(
        self,
        mirrored: bool,
        exemplar: Tensor,
        guide: Tensor,
        exemplar_guide: Tensor,
        cost: Tensor,
        accents: Tensor,
        usage_factor: Tensor,
    ) -> None:
        self.guide = guide
        self.cost, self.accents, self.usage_factor = (x.flatten() for x in (cost, accents, usage_factor))
        self.here = positions(*(torch.arange(side, device=guide.device) for side in sides(guide)))
        self.exemplar = exemplar
        self.part_width = exemplar.shape[-1] // 2 if mirrored else exemplar.shape[-1]
        patches = _extract_patches(exemplar)
        centred = patches - patches.mean(dim=0)
        scatter = (centred.T @ centred).cpu()  # small, and not every accelerator has eigh
        self.basis = torch.linalg.eigh(scatter).eigenvectors[:, -PATCH_COMPONENTS:].to(exemplar.device) / PATCH
        self.patches = torch.cat([patches @ self.basis, exemplar_guide[0].flatten(1).T], dim=1)
        self.usage = torch.zeros_like(self.cost)

    def search(self, places: Tensor, picture: Tensor, rng: torch.Generator) -> Tensor:
        """One round of search for patches of lower cost: propagation from neighbours, then random search.

        Args:
            places: `[2, h, w]`, the patches so far.
            picture: `[1, 3, h, w]`, what they paint.
            rng: Draws the random places, in ever smaller windows around a pixel's own.
        """
        wanted = torch.cat([_extract_patches(picture) @ self.basis, self.guide[0].flatten(1).T], dim=1)
        self._update_usage(places)
        cost = self._cost(wanted, places)
        moves = [(0, step) for far in (4, 2, 1) for step in (far, -far)]
        moves += [move[::-1] for move in moves]
        reaches = [max(sides(self.exemplar)) // 4 // 3**power for power in range(4)]
        for move in (*moves, *reaches):
            if isinstance(move, tuple):
                candidate, factor = propagate(places, self.here, sides(self.exemplar), *move), 1.0
            else:
                factor = JUMP_FACTOR
                jump = torch.randint(-move, move + 1, places.shape, generator=rng)
                candidate = clamp_places(places + jump.to(places.device), sides(self.exemplar))
            candidate_cost = self._cost(wanted, candidate)
            same_part = candidate[1] // self.part_width == places[1] // self.part_width
            better = (candidate_cost * factor < cost) & same_part
            places, cost = torch.where(better, candidate, places), torch.where(better, candidate_cost, cost)
        return places

    def _cost(self, wanted: Tensor, places: Tensor) -> Tensor:
        """Cost `[h, w]` of taking these places: distance to what is wanted `[h·w, K]`, their own cost, their usage."""
        index = _flat_index(places, sides(self.exemplar))
        # index_select copies whole rows, and the rest works in place: a third of the time of the plain expression.
        distance = self.patches.index_select(0, index).sub_(wanted).square_().sum(dim=1)
        return (distance + self.cost[index] + self.usage[index] * self.usage_factor).view(sides(places))

    def _update_usage(self, places: Tensor) -> None:
        """Sets the cost of each patch's usage, averaged with the last rounds', and raises that of overused accents."""
        index = _flat_index(places, sides(self.exemplar))
        count = torch.bincount(index, minlength=len(self.cost)).view(1, 1, *sides(self.exemplar)).float()
        count = F.avg_pool2d(F.pad(count, [USAGE_WINDOW // 2] * 4, mode="replicate"), USAGE_WINDOW, 1)
        usage = USAGE_COST * (len(self.cost) / len(index)) * count.flatten()
        self.usage = (self.usage + usage) / 2 if self.usage.any() else usage
        # For good, or all that leave an accent together would come back together.
        self.cost = torch.maximum(self.cost, ACCENT_COST * self.accents * (count.flatten() - ACCENT_USES))


def find_accents(picture: Tensor) -> Tensor:
    """Small things in a colour that nothing around them has: an ear tag, a beak, a flower.

    Such a thing strikes the eye when it is repeated, where fur and grass may be: an ear must not become all tag.

    Args:
        picture: `[1, 3, h, w]` in 0..1.

    Returns:
        `[1, 1, h, w]`, by how much the chroma differs from its median around; 0 where it hardly does.
    """
    chroma = reduce(picture - to_grey(picture), ACCENT_SCALE)
    around = F.unfold(F.pad(chroma, [ACCENT_WINDOW // 2] * 4, mode="replicate"), ACCENT_WINDOW)
    median = around.view(3, ACCENT_WINDOW**2, -1).median(dim=1).values.view_as(chroma)
    accents = (chroma - median).square_().sum(dim=1, keepdim=True).sqrt_().sub_(ACCENT_FAINT).clamp_(min=0)
    return F.max_pool2d(resize(accents, sides(picture)), PATCH, 1, PATCH // 2)  # for all patches that reach into one


def _border(exemplar: Tensor, parts: int) -> Tensor:
    """`[1, 1, H', W']`: 1 at the outermost pixels of each of the parts that stand side by side, otherwise 0."""
    border = torch.ones_like(exemplar[:, :1, :, : exemplar.shape[-1] // parts])
    border[..., 1:-1, 1:-1] = 0
    return border.repeat(1, 1, 1, parts)


def _flat_index(places: Tensor, size: tuple[int, int]) -> Tensor:
    return (places[0] * size[1] + places[1]).flatten()


def _extract_patches(picture: Tensor) -> Tensor:
    """The patch around every pixel: `[1, 3, h, w]` to `[h·w, 3·PATCH²]`."""
    return F.unfold(F.pad(picture, [PATCH // 2] * 4, mode="replicate"), PATCH)[0].T
