"""Paints a picture out of the patches of another one, led by guides that say which places correspond.

Image analogies (Hertzmann et al., 2001) found by patch matching (Barnes et al., 2009), coarse to fine: every place
takes the patch that agrees best with its guide and with what its neighbours have taken. Patches cost the more, the more
they are used (Kaspar et al., 2015): without that, a few smooth patches would be spread over everything.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import resize, sides

PATCH = 5
"""Side in pixels of the patches that are compared."""

BRUSH = 3
"""Side in pixels of the patches that are laid over each other in the end: smaller is sharper."""

COLOURS = 16
"""Principal components of a patch's colours that are compared."""

USAGE_COST = 0.1
"""Cost of a patch that is used as often as the average one; as much as a colour off by 0.18 per channel."""

USAGE_AREA = 9
"""Side in pixels of the squares over which use is counted."""

LEVELS = ((2, 4), (1, 2))
"""How many times smaller than the guide each level is, and how often the picture is painted anew there."""


@torch.no_grad()
def synthesise(look: Tensor, guide: Tensor, look_guide: Tensor, start: Tensor, cost: Tensor | None = None) -> Tensor:
    """A picture of the guide's shape made of the look's pixels.

    Args:
        look: `[1, 3, H', W']` in 0..1, where the pixels come from.
        guide: `[1, C, H, W]`, descriptors of the places to be painted. Their squared differences to those of the look
            add to the mean squared differences of the colours.
        look_guide: `[1, C, H', W']`, likewise of the look.
        start: `[2, h, w]`, for a grid of places the steps (rows, columns) in pixels to the first patches tried.
        cost: `[1, 1, H', W']`, further cost of each place of the look.

    Returns:
        `[1, 3, H, W]` in 0..1.
    """
    chance = torch.Generator().manual_seed(0)
    steps = start.float()
    cost = torch.zeros_like(look[:, :1]) if cost is None else cost
    for reduction, rounds in LEVELS:
        canvas = _Canvas(*(_reduced(x, reduction) for x in (look, guide, look_guide, cost)))
        wide = F.interpolate(steps[None], sides(canvas.guide), mode="nearest")[0]
        places = canvas.inside(canvas.here + (wide / reduction).round().long())
        for _ in range(rounds):
            places = canvas.search(places, canvas.paint(places, PATCH), chance)
        steps = (places - canvas.here).float() * reduction
    return canvas.paint(places, BRUSH)


class _Canvas:
    """One level of the pyramid: the look's patches, and a picture that is painted with them.

    A field of places `[2, h, w]` holds for each pixel of the picture the row and column of its patch in the look.
    """

    def __init__(self, look: Tensor, guide: Tensor, look_guide: Tensor, cost: Tensor) -> None:
        self.guide, self.cost = guide, cost.flatten()
        height, width = sides(guide)
        self.look_size = sides(look)
        self.pixels = look[0].flatten(1).T.contiguous()
        self.here = torch.stack(
            torch.meshgrid(
                torch.arange(height, device=look.device), torch.arange(width, device=look.device), indexing="ij"
            )
        )
        patches = _patches(look)
        centred = patches - patches.mean(dim=0)
        spread = (centred.T @ centred).cpu()  # small, and not every accelerator can decompose it
        self.basis = torch.linalg.eigh(spread).eigenvectors[:, -COLOURS:].to(look.device) / PATCH
        self.patches = torch.cat([patches @ self.basis, look_guide[0].flatten(1).T], dim=1)
        self.usage: Tensor | None = None

    def inside(self, places: Tensor) -> Tensor:
        """The places, those outside of the look moved to its border."""
        height, width = self.look_size
        return torch.stack([places[0].clamp(0, height - 1), places[1].clamp(0, width - 1)])

    def paint(self, places: Tensor, side: int) -> Tensor:
        """The picture `[1, 3, h, w]` that patches of a side make: the mean where they overlap."""
        reach = range(-(side // 2), side // 2 + 1)
        indices = (self._index(self._along(places, down, right)) for down in reach for right in reach)
        return (
            torch.stack([self.pixels.index_select(0, index) for index in indices])
            .mean(dim=0)
            .T.reshape(1, 3, *sides(places))
        )

    def search(self, places: Tensor, picture: Tensor, chance: torch.Generator) -> Tensor:
        """Better places: those next to what neighbours have taken, or random ones ever closer to a place's own."""
        wanted = torch.cat([_patches(picture) @ self.basis, self.guide[0].flatten(1).T], dim=1)
        price = self._price(places)
        cost = self._cost(wanted, places, price)
        moves = [(0, step) for far in (4, 2, 1) for step in (far, -far)]
        moves += [move[::-1] for move in moves]
        reaches = [max(self.look_size) // 4 // 3**power for power in range(4)]
        for move in (*moves, *reaches):
            if isinstance(move, tuple):
                candidate = self._along(places, *move)
            else:
                jump = torch.randint(-move, move + 1, places.shape, generator=chance)
                candidate = self.inside(places + jump.to(places.device))
            candidate_cost = self._cost(wanted, candidate, price)
            better = candidate_cost < cost
            places, cost = torch.where(better, candidate, places), torch.where(better, candidate_cost, cost)
        return places

    def _along(self, places: Tensor, down: int, right: int) -> Tensor:
        """Where a place's patch would be if it continued that of the neighbour so many pixels away."""
        rows = (self.here[0, :, 0] + down).clamp(0, places.shape[1] - 1)
        columns = (self.here[1, 0] + right).clamp(0, places.shape[2] - 1)
        steps = (places - self.here).index_select(1, rows).index_select(2, columns)
        return self.inside(steps + self.here)

    def _index(self, places: Tensor) -> Tensor:
        return (places[0] * self.look_size[1] + places[1]).flatten()

    def _cost(self, wanted: Tensor, places: Tensor, price: Tensor) -> Tensor:
        index = self._index(places)
        # index_select copies whole rows, and the rest works in place: a third of the time of the plain expression.
        apart = self.patches.index_select(0, index).sub_(wanted).square_().sum(dim=1)
        return (apart + price[index]).view(sides(places))

    def _price(self, places: Tensor) -> Tensor:
        """Cost `[N]` of each place of the look: its own, and that of its use, averaged with the use before."""
        index = self._index(places)
        count = torch.bincount(index, minlength=len(self.pixels)).view(1, 1, *self.look_size).float()
        count = F.avg_pool2d(F.pad(count, [USAGE_AREA // 2] * 4, mode="replicate"), USAGE_AREA, 1)
        usage = count.flatten() * (len(self.pixels) / len(index))
        self.usage = usage if self.usage is None else (self.usage + usage) / 2
        return USAGE_COST * self.usage + self.cost


def _patches(picture: Tensor) -> Tensor:
    """The patch around every pixel: `[1, 3, h, w]` to `[h·w, 3·PATCH²]`."""
    return F.unfold(F.pad(picture, [PATCH // 2] * 4, mode="replicate"), PATCH)[0].T


def _reduced(x: Tensor, reduction: int) -> Tensor:
    height, width = sides(x)
    return resize(x, (max(1, height // reduction), max(1, width // reduction)))
