"""Transfer of a clip: one generator, trained on a few key frames, makes every frame."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import SpliceError
from ..images import LEAST_MASK, sides
from ..masks import composite
from ..presets import DEFAULT_PRESET, PRESETS
from ..settings import Settings
from ..vit.backbone import Backbone
from .generator import Generator
from .objective import Objective
from .pair import Pair, add_noise_if_flat
from .rendering import render_anywhere
from .run import Step
from .transfer import Transfer

LEAST_WARM_STARTS = 4
"""Warm starts of a single picture that the generator of a clip gets at least: it has to learn the whole appearance,
since no residual brings what it lacks. After one alone its output is pale and brownish."""


class ClipTransfer(Transfer):
    """A run on the key frames of a clip, which trains one generator for all frames of it.

        run = ClipTransfer(key_frames, appearance, backbone)
        for step in run:
            ...
        results = (run.apply(frame) for frame in frames)

    The steps train on the key frames in turn; the warm start, in which the generator learns their matched images, has
    as many steps for each of them as a single picture gets, and for `LEAST_WARM_STARTS` at least. They are not refined,
    and there is no residual: what is laid over the generator's output belongs to one frame, and would stand still or
    jump where the clip moves. The output alone moves as the clip does, since it is one function of the pixels.

    Args:
        frames: The key frames, `[1, 3, H, W]` in 0..1, all of one size; see `choose_key_frames`.
        appearance: `[1, 3, H', W']` in 0..1.
        backbone: As for `Transfer`, likewise what is not named here.
        settings: The recipe; `refine_steps` and `residual` have no effect.
        objective: Replaces the recipe's own terms.
        masks: Of each key frame, `[1, 1, h, w]` in 0..1, or None.
        appearance_mask: The part of B that is the appearance.
        generator: Training starts from a copy of it, in place of a warm start.

    Raises:
        SpliceError: No key frame, several sizes, or what a `Transfer` cannot work with.
    """

    def __init__(
        self,
        frames: Sequence[Tensor],
        appearance: Tensor,
        backbone: Backbone,
        settings: Settings = PRESETS[DEFAULT_PRESET],
        objective: Objective | None = None,
        masks: Sequence[Tensor | None] | None = None,
        appearance_mask: Tensor | None = None,
        generator: Generator | None = None,
    ) -> None:
        if not frames or len({sides(frame) for frame in frames}) != 1:
            raise SpliceError("a clip needs key frames, all of one size")
        masks = [None] * len(frames) if masks is None else list(masks)
        settings = clip_recipe(settings, len(frames))
        super().__init__(frames[0], appearance, backbone, settings, objective, masks[0], appearance_mask, generator)
        self._others = [
            Transfer(frame, appearance, backbone, settings, objective, mask, appearance_mask, generator)
            for frame, mask in zip(frames[1:], masks[1:], strict=True)
        ]

    def __iter__(self) -> Iterator[Step]:
        for step in super().__iter__():
            yield step
            if self.step < self.steps:
                phase = self._warm_start if self.step < self.settings.warm_steps else self._splicing
                phase.pair = self._pairs[self.step % len(self._pairs)]

    def end(self, device: str | torch.device) -> None:
        """As `Transfer.end`; `apply` too works on that device then."""
        vars(self).pop("_pairs", None)
        self._others.clear()
        super().end(device)

    def apply(self, frame: Tensor, mask: Tensor | None = None) -> Tensor:
        """A frame of the clip in the appearance of B.

        Args:
            frame: `[1, 3, H, W]` in 0..1.
            mask: `[1, 1, h, w]` in 0..1, where it may change. One that selects nothing leaves the frame as it is.

        Returns:
            `[1, 3, H, W]` in 0..1, on the run's device.

        Raises:
            SpliceError: The run has diverged.
        """
        frame = frame.to(self.device)
        if mask is not None and mask.max() < LEAST_MASK:
            return frame
        result = render_anywhere(self.generator, add_noise_if_flat(frame), size=self.settings.size)
        if not torch.isfinite(result).all():
            raise SpliceError(f"the run has diverged by step {self.step}: lower the learning rate, or try another seed")
        return result if mask is None else composite(frame, result, mask.to(self.device), self.settings.feather)

    @cached_property
    def _pairs(self) -> list[Pair]:
        """Each key frame with the appearance picture, at training size."""
        return [self.pair, *(other.pair for other in self._others)]


def clip_recipe(settings: Settings, key_frames: int) -> Settings:
    """The recipe for a single picture as a clip with so many key frames takes it."""
    warm_steps = settings.warm_steps * max(LEAST_WARM_STARTS, key_frames)
    return replace(settings, refine_steps=0, residual=0.0, warm_steps=warm_steps)
