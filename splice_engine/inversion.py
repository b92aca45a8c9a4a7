"""Feature inversion: a picture in which a ViT sees the same as in a given one (paper, section 3.1 and supplement)."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, Request
from .errors import SpliceError
from .gemm import fast_fp32
from .generator import Generator
from .images import check_picture, resize, short_side_size, sides
from .objective import VIT_LONGEST
from .settings import DEFAULT_INVERSION, INVERSION_PRESETS, InversionSettings
from .transfer import Step

INVERTIBLE = ("cls", "token", "key")
"""What can be inverted: the [CLS] token, all tokens as a block leaves them, or their keys."""

NOISE_CHANNELS = 32
CHANNELS = (16, 32, 64, 128, 128, 128)


class Inversion:
    """A run that inverts one feature: iterate to train, leave the loop to stop, take the picture whenever you like.

    A network that knows nothing but noise paints the picture: its shape alone keeps the picture natural (Ulyanov et
    al., "Deep Image Prior", 2018). What it shows is what the feature has kept.

    Args:
        picture: `[1, 3, H, W]` in 0..1.
        backbone: The frozen ViT; the run takes place on its device.
        settings: The recipe.
        layer: Index of the block, 0 the first, -1 the last.
        facet: "cls", "token" or "key".

    Raises:
        SpliceError: Unknown layer or facet, or a picture that cannot be worked with.
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
        longest = max(settings.size, VIT_LONGEST)
        self.size = backbone.grid_size(*sides(self.picture), short=settings.size, longest=longest)
        with torch.no_grad():
            self.target = self._read(resize(self.picture.to(self.device), self.size))
        self.step = 0
        self.generator = Generator(CHANNELS, settings.seed, NOISE_CHANNELS).to(self.device)
        self._chance = torch.Generator().manual_seed(settings.seed)
        self.noise = self._draw()
        self._optimizer = torch.optim.Adam(
            self.generator.parameters(), settings.learning_rate, betas=(0.9, settings.beta2)
        )

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.settings.steps

    def __len__(self) -> int:
        """Steps that are left."""
        return max(0, self.steps - self.step)

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.steps:
            with fast_fp32() if self.device.type == "cpu" else nullcontext():
                loss = F.mse_loss(self._read(self.generator(self._input())), self.target)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._optimizer.step()
            self.step += 1
            yield Step(self.step - 1, loss.detach(), {"feature": loss.detach()})

    @torch.no_grad()
    def image(self, size: int | None = None) -> Tensor:
        """The picture so far.

        Args:
            size: Short side in pixels to enlarge it to, with the aspect of the inverted picture; None leaves it as the
                ViT sees it.

        Returns:
            `[1, 3, H, W]` in 0..1, on the run's device.

        Raises:
            SpliceError: The run has diverged, so that there is no picture.
        """
        result: Tensor = self.generator(self.noise)
        if not torch.isfinite(result).all():
            raise SpliceError(f"the run has diverged by step {self.step}: lower the learning rate, or try another seed")
        return result if size is None else resize(result, short_side_size(*sides(self.picture), size))

    def _read(self, picture: Tensor) -> Tensor:
        return self.backbone(picture, [self.request])[self.request]

    def _input(self) -> Tensor:
        settings = self.settings
        stages = (settings.noise_first, settings.noise_second, settings.noise_third)
        noise = stages[self.step * len(stages) // self.steps]
        # Keys and tokens have a place, which new noise would only blur; without one, noise keeps it from settling.
        return self.noise + noise * self._draw() if noise and self.request.facet == "cls" else self.noise

    def _draw(self) -> Tensor:
        return torch.randn(1, NOISE_CHANNELS, *self.size, generator=self._chance).to(self.device)
