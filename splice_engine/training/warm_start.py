"""The warm start: the generator learns the matched image, and B, pixel by pixel and without the ViT."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..images import resize, sides
from ..settings import Settings
from ..vit.backbone import Backbone
from .crops import MIN_CROP, CropSampler
from .generator import Generator
from .losses import MatchedL1, Reconstruction
from .objective import Objective, Pictures
from .pair import Pair, Sample
from .run import backward

WARM_SEED = 0
"""Of the warm start, and of the generator that it begins with."""


class WarmStart:
    """The first steps of a run; like `Splicing` it has a `take_step()`.

    The matched image is learnt whole, without crops or flips: half as many steps reach as far, and those come later.
    Its random draws are the same for all seeds, so that runs of one pair can share it.

    Args:
        generator: Whose weights are trained.
        forward: Applies it.
        pair: With its matched image.
        backbone: Of the run; it takes no part.
        settings: The recipe.
    """

    def __init__(
        self,
        generator: Generator,
        forward: Callable[[Tensor], Tensor],
        pair: Pair,
        backbone: Backbone,
        settings: Settings,
    ) -> None:
        self.forward, self.pair, self.settings = forward, pair, settings
        self.sampler = CropSampler(settings, torch.Generator().manual_seed(WARM_SEED))
        self.index = 0
        self.objective = Objective([MatchedL1(), Reconstruction()], backbone)
        highest = settings.warm_learning_rate
        self.optimizer = torch.optim.Adam(generator.parameters(), highest)
        self.cycle = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, highest, total_steps=settings.warm_steps)

    def take_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: its total, and the unweighted losses by name."""
        settings, pair = self.settings, self.pair
        a = Sample(pair.structure, pair.matched, mask=pair.structure_mask)
        b = self.sampler.appearance_crop(pair) if self.index % settings.identity_every == 0 else None
        if self.index < settings.warm_coarse * settings.warm_steps:
            a, b = _halved(a), b and _halved(b)
        pictures = Pictures(
            output=self.forward(a.picture),
            structure=a.picture,
            matched=a.target,
            structure_mask=a.mask,
            reconstruction=self.forward(b.picture) if b else None,
            appearance=b.picture if b else None,
            appearance_mask=b.mask if b else None,
        )
        self.optimizer.zero_grad(set_to_none=True)
        total, losses = backward(self.objective, pictures)
        self.optimizer.step()
        self.cycle.step()
        self.index += 1
        return total, losses


def _halved(sample: Sample) -> Sample:
    """A sample at half its size, save where the generator could not halve it any further then."""

    def half(x: Tensor | None) -> Tensor | None:
        if x is None or min(sides(x)) < 2 * MIN_CROP:
            return x
        return resize(x, (x.shape[-2] // 2, x.shape[-1] // 2))

    picture = half(sample.picture)
    assert picture is not None
    return Sample(picture, half(sample.target), mask=half(sample.mask))
