"""Refinement: the matched image itself is optimised, against tokens and patches of the appearance picture.

No generator takes part. What is optimised is the brightness of the picture; its colours are the instant transfer's.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import SpliceError
from ..images import check_mask, check_picture, resize, sides
from ..masks import composite
from ..matching.correspondence import Correspondence
from ..matching.descriptors import working_size
from ..matching.instant import InstantTransfer
from ..matching.mixture import InstantMixture
from ..matching.parts import divide_into_parts
from ..settings import RefinementSettings
from ..vit.backbone import Backbone
from ..vit.precision import fast_fp32
from .brightness import BrightnessOptimizer
from .run import Run, Step, move_parts


class Refinement(Run):
    """A run that refines the instant transfer: iterate, leave the loop to stop, take the picture whenever you like.

        for step in (run := Refinement(structure, appearance, backbone)):
            print(step.index, step.total.item())
        result = run.image()

    Args:
        structure: `[1, 3, H, W]` in 0..1.
        appearance: Likewise, of any size.
        backbone: The frozen ViT; the run takes place on its device.
        settings: The recipe.
        structure_mask: `[1, 1, H, W]` in 0..1, of any size: where the picture is to change.
        appearance_mask: Likewise: the part of B that is the appearance.

    Attributes:
        settings: The recipe.
        step: Steps taken so far.

    Raises:
        SpliceError: A picture or a mask that cannot be worked with.
    """

    def __init__(
        self,
        structure: Tensor,
        appearance: Tensor,
        backbone: Backbone,
        settings: RefinementSettings = RefinementSettings(),  # noqa: B008 (frozen)
        structure_mask: Tensor | None = None,
        appearance_mask: Tensor | None = None,
    ) -> None:
        self.picture = check_picture(structure, "structure picture")
        self.appearance = check_picture(appearance, "appearance picture")
        self.mask, self.appearance_mask = (
            None if mask is None else check_mask(mask, name).to(backbone.device)
            for mask, name in ((structure_mask, "structure mask"), (appearance_mask, "appearance mask"))
        )
        self.backbone, self.device, self.settings = backbone, backbone.device, settings
        self.step = 0
        self._change: Tensor | None = None

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.settings.steps

    @cached_property
    def instant(self) -> InstantTransfer | InstantMixture:
        """The instant transfer that is refined."""
        return InstantTransfer.between(
            self.picture, self.appearance, self.backbone, self.settings, self.mask, self.appearance_mask
        )

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.steps:
            with fast_fp32() if self.device.type == "cpu" else nullcontext():
                total, losses = self.take_step()
            yield Step(self.step - 1, total, losses)

    def take_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: its total, and the unweighted losses by name."""
        rate = self.settings.learning_rate * (1 - self.step / self.steps)
        total, losses = self._optimizer.take_step(rate)
        self._change = self._optimizer.change().detach()
        self.step += 1
        if not self.steps_left:
            vars(self).pop("_optimizer")  # whoever goes on to train a generator needs its memory
        return total, losses

    @torch.no_grad()
    def painted(self, size: int | None = None) -> Tensor:
        """The picture so far, painted also where the mask does not allow it; arguments as for `image`."""
        result = self.instant.painted(size)
        if self._change is None:
            return result
        if not torch.isfinite(self._change).all():
            raise SpliceError(f"the run has diverged by step {self.step}: lower the learning rate, or try another seed")
        return (result + resize(self._change, sides(result))).clamp(0, 1)

    @torch.no_grad()
    def image(self, size: int | None = None) -> Tensor:
        """The picture so far: the instant transfer at that size, with the change of its brightness.

        Args:
            size: Short side in pixels; None is the structure picture's full size.

        Returns:
            `[1, 3, H, W]` in 0..1, on the run's device. Past the mask and its feather it is exactly the structure.

        Raises:
            SpliceError: The run has diverged, so that there is no picture.
        """
        result = self.painted(size)
        if self.mask is None:
            return result
        picture = resize(self.picture.to(self.device), sides(result))
        feather = self.settings.feather * min(sides(picture)) / min(sides(self.picture))
        return composite(picture, result, self.mask, feather)

    def state(self) -> dict[str, Any]:
        """All that steps change, as tensors and plain values."""
        return {
            "step": self.step,
            "change": self._change,
            "optimizer": self._optimizer.state() if 0 < self.step < self.steps else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Brings the run to where `state` was taken."""
        self.step = state["step"]
        self._change = None if state["change"] is None else state["change"].to(self.device)
        if state["optimizer"] is not None:
            self._optimizer.restore(state["optimizer"])

    def end(self, device: str | torch.device) -> None:
        """Moves what `image` needs to a device and frees what only steps need: none can be taken any more."""
        vars(self).pop("_optimizer", None)
        self.device = torch.device(device)
        move_parts(vars(self), ("instant", "mask", "_change"), self.device)

    @cached_property
    def _optimizer(self) -> BrightnessOptimizer:
        match = Correspondence.between(
            self.picture,
            self.appearance,
            self.backbone,
            source_mask=self.mask,
            target_mask=self.appearance_mask,
            density=self.settings.density,
        )
        size = min(self.settings.size, *sides(self.picture))
        a, b = (
            resize(picture, working_size(picture, self.backbone, max(1, size // self.backbone.patch))).to(self.device)
            for picture in (self.picture, self.appearance)
        )
        start = resize(self.instant.painted(min(sides(a))), sides(a))
        if self.settings.match_passes > 1:
            match = match.refine(start, self.backbone, mask=None if self.appearance_mask is None else self.mask)
        match, *_ = divide_into_parts(match)
        assert isinstance(self.instant, InstantTransfer)  # a mixture is not refined
        kept = self.instant.detail_share(min(sides(a)))
        return BrightnessOptimizer(a, b, start, match, self.backbone, self.mask, kept, self.settings)
