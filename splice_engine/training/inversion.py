"""Feature inversion: a picture from which a ViT extracts a given feature (paper, section 3.1 and supplement)."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError
from ..images import check_picture, resize, short_side_size, sides
from ..presets import DEFAULT_INVERSION, INVERSION_PRESETS
from ..settings import VIT_LONGEST, InversionSettings
from ..vit.backbone import Backbone, Request
from ..vit.precision import fast_fp32
from .generator import Generator
from .run import Run, Step

INVERTIBLE = ("cls", "token", "key")
"""What can be inverted: the [CLS] token, all tokens of a block's output, or their keys."""

NOISE_CHANNELS = 32
"""Channels of the network's input."""

INVERSION_CHANNELS = (16, 32, 64, 128, 128, 128)
"""Width of each level of the network, finest first."""

LEAST_SIDE = 2 ** len(INVERSION_CHANNELS) + 1
"""Pixels of the shortest side that leaves the deepest level two places to pad and to normalise over."""


class Inversion(Run):
    """A run that inverts one feature: iterate to train, leave the loop to stop, take the picture whenever you like.

    The picture is the output of a network for fixed noise, whose architecture is a prior for natural pictures (Ulyanov
    et al., "Deep Image Prior", 2018). It shows what information the feature holds. The constructor only checks and
    keeps what it is given; work begins with the first step.

    Args:
        picture: `[1, 3, H, W]` in 0..1.
        backbone: The frozen ViT; the run takes place on its device.
        settings: The recipe.
        layer: Index of the block, 0 the first, -1 the last.
        facet: "cls", "token" or "key".

    Attributes:
        settings: The recipe.
        step: Steps taken so far.
        size: (height, width) in pixels of the picture that is made, on the patch grid; its short side is larger than
            the recipe's where the network needs it.

    Raises:
        SpliceError: Unknown layer or facet, or a picture that `check_picture` refuses.
    """

    def __init__(
        self,
        picture: Tensor,
        backbone: Backbone,
        settings: InversionSettings = INVERSION_PRESETS[DEFAULT_INVERSION],
        layer: int = -1,
        facet: str = "cls",
    ) -> None:
        if facet not in INVERTIBLE:
            raise SpliceError(f"cannot invert '{facet}': choose one of {', '.join(INVERTIBLE)}")
        self.settings = settings
        self.device = backbone.device
        self.picture = check_picture(picture)
        self.request = Request(backbone.resolve(layer), facet)
        self.backbone = backbone
        height, width = sides(self.picture)
        least = math.ceil(LEAST_SIDE / backbone.patch) * backbone.patch
        longest = max(settings.size, VIT_LONGEST, math.ceil(least * max(height, width) / min(height, width)))
        self.size = backbone.grid_size(height, width, short=max(settings.size, least), longest=longest)
        self.step = 0
        self.generator = Generator(INVERSION_CHANNELS, settings.seed, NOISE_CHANNELS).to(self.device)
        self._rng = torch.Generator().manual_seed(settings.seed)
        self._optimizer = torch.optim.Adam(
            self.generator.parameters(), settings.learning_rate, betas=(0.9, settings.beta2)
        )

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.settings.steps

    @cached_property
    def target(self) -> Tensor:
        """The feature of the given picture, of the shape that `Request` gives for the facet."""
        with torch.no_grad():
            return self._extract(resize(self.picture.to(self.device), self.size))

    @cached_property
    def noise(self) -> Tensor:
        """The fixed input of the network, `[1, NOISE_CHANNELS, H, W]`."""
        return self._draw_noise()

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.steps:
            with fast_fp32() if self.device.type == "cpu" else nullcontext():
                target = self.target
                loss = F.mse_loss(self._extract(self.generator(self._perturbed_noise())), target)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._optimizer.step()
            self.step += 1
            yield Step(self.step - 1, loss.detach(), {"feature": loss.detach()})

    @torch.no_grad()
    def image(self, size: int | None = None) -> Tensor:
        """The picture so far.

        Args:
            size: Short side in pixels to resize it to, with the aspect of the given picture; None keeps the size at
                which the ViT gets it.

        Returns:
            `[1, 3, H, W]` in 0..1, on the run's device.

        Raises:
            SpliceError: The run has diverged, so that there is no picture.
        """
        result: Tensor = self.generator(self.noise)
        if not torch.isfinite(result).all():
            raise SpliceError(f"the run has diverged by step {self.step}: lower the learning rate, or try another seed")
        return result if size is None else resize(result, short_side_size(*sides(self.picture), size))

    def _extract(self, picture: Tensor) -> Tensor:
        return self.backbone(picture, [self.request])[self.request]

    def _perturbed_noise(self) -> Tensor:
        """The fixed noise, with new noise added when [CLS] is inverted."""
        fixed = self.noise  # drawn before the new noise, so that the seed alone determines it
        stages = (self.settings.noise_first, self.settings.noise_second, self.settings.noise_third)
        deviation = stages[self.step * len(stages) // self.steps]
        # New noise keeps the picture from settling early. Keys and tokens have a place, where it would only blur them.
        if not deviation or self.request.facet != "cls":
            return fixed
        return fixed + deviation * self._draw_noise()

    def _draw_noise(self) -> Tensor:
        return torch.randn(1, NOISE_CHANNELS, *self.size, generator=self._rng).to(self.device)
