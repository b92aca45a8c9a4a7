"""The recipe's random views of the pair, made on the pictures' own device (paper, section 4).

Chance is drawn on the host from one seeded generator, so that no step waits for the device.
"""

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from .masks import covered
from .settings import Settings

BRIGHTNESS = CONTRAST = 0.4
SATURATION = 0.2
HUE = 0.1
BLUR_SIGMA = (0.1, 2.0)
MIN_CROP = 48
"""Pixels that the generator's five levels can halve."""


class Views:
    """Draws views of pictures.

    Args:
        settings: Probabilities and crop size.
        generator: A CPU generator; the only source of chance.
    """

    def __init__(self, settings: Settings, generator: torch.Generator) -> None:
        self.settings = settings
        self.generator = generator

    def crop_or_whole(self, picture: Tensor, mask: Tensor | None = None) -> Tensor:
        """A square crop or the whole picture, perhaps mirrored: `[1, C, H, W]` to `[1, C, h, w]`; mask as in `crop`."""
        if self.settings.whole and self._chance(self.settings.whole):
            return picture.flip(-1) if self._chance(self.settings.flip) else picture
        return self.crop(picture, mask)

    def crop(self, picture: Tensor, mask: Tensor | None = None) -> Tensor:
        """A square crop, perhaps mirrored: `[1, C, H, W]` to `[1, C, s, s]`.

        Args:
            picture: The picture, and whatever else of its size is to be seen in the same view, along the channels.
            mask: `[1, 1, H, W]` in 0..1: the crop is moved to hold all that it covers, or as much as fits. Where it
                would still miss it, the view is the whole picture.
        """
        height, width = picture.shape[-2:]
        side = max(MIN_CROP, round(height * self._uniform(self.settings.crop, 1.0)))
        side = min(side, height, width)
        top, left = self._below(height - side + 1), self._below(width - side + 1)
        if mask is not None:
            seen = covered(mask)[0, 0]
            top, left = _moved(top, side, seen.any(dim=1)), _moved(left, side, seen.any(dim=0))
            if not seen[top : top + side, left : left + side].any():
                top, left, side = 0, 0, max(height, width)
        view = picture[..., top : top + side, left : left + side]
        return view.flip(-1) if self._chance(self.settings.flip) else view

    def pick(self, count: int) -> int:
        """One of so many views that recur."""
        return self._below(count)

    def disturb(self, view: Tensor) -> Tensor:
        """Perhaps other colours, perhaps a blur, as views of the structure picture get them: `[1, 3, h, w]`."""
        if self._chance(self.settings.jitter):
            view = self._jittered(view)
        if self._chance(self.settings.blur):
            view = TF.gaussian_blur(view, [3, 3], [self._uniform(*BLUR_SIGMA)])
        return view

    def _jittered(self, view: Tensor) -> Tensor:
        changes = [
            (TF.adjust_brightness, self._uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)),
            (TF.adjust_contrast, self._uniform(1 - CONTRAST, 1 + CONTRAST)),
            (TF.adjust_saturation, self._uniform(1 - SATURATION, 1 + SATURATION)),
            (TF.adjust_hue, self._uniform(-HUE, HUE)),
        ]
        for index in torch.randperm(len(changes), generator=self.generator).tolist():
            change, amount = changes[index]
            view = change(view, amount)
        return view

    def _chance(self, probability: float) -> bool:
        return self._uniform(0.0, 1.0) < probability

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self.generator))


def _moved(start: int, side: int, seen: Tensor) -> int:
    """Where along one axis a crop starts that lies over what is seen, `[L]` booleans, as near to `start` as can be."""
    places = seen.nonzero()
    first, last = int(places[0]), int(places[-1])
    low, high = sorted((first, last + 1 - side))
    return min(max(start, low, 0), high, len(seen) - side)
