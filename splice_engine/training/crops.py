"""What a step trains on: random crops of the pair, made on the pictures' own device (paper, section 4).

Random numbers are drawn on the host from one seeded `torch.Generator`, so that no step waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..images import sides
from ..masks import covered
from ..settings import Settings
from .pair import Pair, Sample

BRIGHTNESS = CONTRAST = 0.4
SATURATION = 0.2
HUE = 0.1
BLUR_SIGMA = (0.1, 2.0)
MIN_CROP = 48
"""Pixels that the generator's five levels can halve."""


@dataclass(frozen=True)
class Crop:
    """A window in pixels, perhaps mirrored; calling it crops `[B, C, H, W]`."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def __call__(self, x: Tensor) -> Tensor:
        x = x[..., self.top : self.top + self.height, self.left : self.left + self.width]
        return x.flip(-1) if self.flip else x


class CropSampler:
    """Draws samples of a pair.

    Args:
        settings: Probabilities and crop size.
        rng: A CPU generator; the only source of random numbers.
    """

    def __init__(self, settings: Settings, rng: torch.Generator) -> None:
        self.settings = settings
        self.rng = rng
        self._structure_cache: dict[tuple[int, int], Sample] = {}
        self._appearance_cache: dict[tuple[int, int], Sample] = {}

    def structure(self, pair: Pair, residual: Tensor | None = None) -> Sample:
        """A sample of the structure picture: a new one, or one of the cached crops."""
        return self._reuse(self._structure_cache, lambda: self._structure_crop(pair, residual))

    def appearance(self, pair: Pair) -> Sample:
        """A sample of the appearance picture: a new one, or one of its cached crops."""
        return self._reuse(self._appearance_cache, lambda: self.appearance_crop(pair), pair.number)

    def appearance_crop(self, pair: Pair) -> Sample:
        """A new sample of the appearance picture."""
        crop = self.crop(sides(pair.appearance), pair.appearance_mask)
        mask = pair.appearance_mask
        return Sample(crop(pair.appearance), mask=None if mask is None else crop(mask))

    def crop_or_whole(self, size: tuple[int, int], mask: Tensor | None = None) -> Crop:
        """A square crop or the whole picture, perhaps mirrored; arguments as for `crop`."""
        if self.settings.whole and self._happens(self.settings.whole):
            return Crop(0, 0, *size, flip=self._happens(self.settings.flip))
        return self.crop(size, mask)

    def crop(self, size: tuple[int, int], mask: Tensor | None = None) -> Crop:
        """A square crop, perhaps mirrored.

        Args:
            size: (height, width) of the picture.
            mask: `[1, 1, H, W]` in 0..1: the crop is moved to hold all that it covers, or as much as fits. Where it
                would still miss it, the crop is the whole picture.
        """
        height, width = size
        side = max(MIN_CROP, round(height * self._uniform(self.settings.crop, 1.0)))
        side = min(side, height, width)
        top, left = self._below(height - side + 1), self._below(width - side + 1)
        rows, columns = side, side
        if mask is not None:
            inside = covered(mask)[0, 0]
            top, left = _moved(top, side, inside.any(dim=1)), _moved(left, side, inside.any(dim=0))
            if not inside[top : top + side, left : left + side].any():
                top, left, rows, columns = 0, 0, height, width
        return Crop(top, left, rows, columns, flip=self._happens(self.settings.flip))

    def augment(self, picture: Tensor) -> Tensor:
        """Perhaps jittered colours, perhaps a blur, as samples of the structure picture get them: `[1, 3, h, w]`."""
        import torchvision.transforms.v2.functional as TF  # takes as long as torch itself

        if self._happens(self.settings.jitter):
            picture = self._jittered(picture)
        if self._happens(self.settings.blur):
            picture = TF.gaussian_blur(picture, [3, 3], [self._uniform(*BLUR_SIGMA)])
        return picture

    def _structure_crop(self, pair: Pair, residual: Tensor | None) -> Sample:
        crop = self.crop_or_whole(sides(pair.structure), pair.structure_mask)
        target, residual, mask = (None if x is None else crop(x) for x in (pair.matched, residual, pair.structure_mask))
        return Sample(self.augment(crop(pair.structure)), target, residual, mask)

    def _reuse(self, cache: dict[tuple[int, int], Sample], draw: Callable[[], Sample], number: int = 0) -> Sample:
        if not self.settings.cached_crops:
            return draw()
        place = number, self._below(self.settings.cached_crops)
        if place not in cache:
            cache[place] = draw()
        return cache[place]

    def _jittered(self, picture: Tensor) -> Tensor:
        import torchvision.transforms.v2.functional as TF

        changes = [
            (TF.adjust_brightness, self._uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)),
            (TF.adjust_contrast, self._uniform(1 - CONTRAST, 1 + CONTRAST)),
            (TF.adjust_saturation, self._uniform(1 - SATURATION, 1 + SATURATION)),
            (TF.adjust_hue, self._uniform(-HUE, HUE)),
        ]
        for index in torch.randperm(len(changes), generator=self.rng).tolist():
            change, amount = changes[index]
            picture = change(picture, amount)
        return picture

    def _happens(self, probability: float) -> bool:
        return self._uniform(0.0, 1.0) < probability

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.rng).item()

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.rng))


def _moved(start: int, side: int, inside: Tensor) -> int:
    """Where along one axis a crop starts that covers the places, `[L]` booleans, as near to `start` as can be."""
    places = inside.nonzero()
    first, last = int(places[0]), int(places[-1])
    low, high = sorted((first, last + 1 - side))
    return min(max(start, low, 0), high, len(inside) - side)
