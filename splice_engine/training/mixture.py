"""Transfer of a mixture: several appearances, by weight, as one."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..images import check_mask, check_picture, resize, sides
from ..matching.mixture import InstantMixture, pair_masks
from ..mixing import to_shares
from ..presets import DEFAULT_PRESET, PRESETS
from ..settings import Settings
from ..vit.backbone import Backbone
from .generator import Generator
from .objective import Objective
from .pair import Pair, to_training_size
from .refinement import Refinement
from .splicing import Splicing
from .transfer import Transfer
from .warm_start import WarmStart

GOLDEN_RATIO = (5**0.5 - 1) / 2


class MixtureTransfer(Transfer):
    """A run on one structure picture and several appearance pictures, of which the result shows a mixture.

        run = MixtureTransfer(structure, [first, second], backbone, weights=[0.7, 0.3])

    The matched image is that of an `InstantMixture`; it is not refined. The terms of the objective compare each step
    with one of the appearances, which take turns as often as their weights say. For the paper's term that is the
    weighted mean of their [CLS] tokens: the mean of squared differences from several points is that from their mean,
    but for a constant.

    Args:
        structure: `[1, 3, H, W]` in 0..1.
        appearances: Likewise, of any sizes.
        backbone: As for `Transfer`, likewise what is not named here.
        weights: One for each appearance, at least 0; only their ratio counts. None is equal weights.
        settings: The recipe; `refine_steps` has no effect.
        objective: Replaces the recipe's own terms.
        structure_mask: Where the picture may change.
        appearance_masks: One or None for each appearance: the part of it that counts. None is none at all.
        generator: Training starts from a copy of it, in place of a warm start.

    Attributes:
        shares: The weights, scaled to a sum of 1.

    Raises:
        SpliceError: No appearance, weights or masks of another number, or what a `Transfer` cannot work with.
    """

    def __init__(
        self,
        structure: Tensor,
        appearances: Sequence[Tensor],
        backbone: Backbone,
        weights: Sequence[float] | None = None,
        settings: Settings = PRESETS[DEFAULT_PRESET],
        objective: Objective | None = None,
        structure_mask: Tensor | None = None,
        appearance_masks: Sequence[Tensor | None] | None = None,
        generator: Generator | None = None,
    ) -> None:
        shares = to_shares(weights, len(appearances))
        masks = pair_masks(appearance_masks, len(appearances))
        settings = replace(settings, refine_steps=0)
        super().__init__(structure, appearances[0], backbone, settings, objective, structure_mask, masks[0], generator)
        self.shares = shares
        self.appearances = [check_picture(appearance, "appearance picture") for appearance in appearances]
        self.appearance_masks = [
            None if mask is None else check_mask(mask, "appearance mask").to(self.device) for mask in masks
        ]

    def end(self, device: str | torch.device) -> None:
        """As `Transfer.end`."""
        vars(self).pop("_pairs", None)
        super().end(device)

    @property
    def _phase(self) -> Refinement | WarmStart | Splicing:
        phase = super()._phase
        if not isinstance(phase, Refinement):
            phase.pair = self._pairs[self._turn]
        return phase

    @property
    def _turn(self) -> int:
        """The appearance of the next step. Multiples of the golden ratio are even over the steps, and over each nth."""
        return bisect_right([*accumulate(self.shares)][:-1], self.step * GOLDEN_RATIO % 1)

    @cached_property
    def _pairs(self) -> list[Pair]:
        """The structure picture with each of the appearances, at training size."""
        pairs = []
        for number, (picture, mask) in enumerate(zip(self.appearances, self.appearance_masks, strict=True)):
            appearance = to_training_size(picture, self.settings.size).to(self.device)
            mask = None if mask is None else resize(mask, sides(appearance))
            pairs.append(replace(self.pair, appearance=appearance, appearance_mask=mask, number=number))
        return pairs

    @cached_property
    def refinement(self) -> Refinement:
        """What paints the matched image, in no steps: the mixture of the instant transfers."""
        return MatchedMixture(self)


class MatchedMixture(Refinement):
    """A refinement of no steps, whose picture is the `InstantMixture` of a run's appearances."""

    def __init__(self, run: MixtureTransfer) -> None:
        super().__init__(run.picture, run.appearance, run.backbone, run.refinement_settings, run.mask)
        self._given = run.appearances, run.appearance_masks, run.shares

    @cached_property
    def instant(self) -> InstantMixture:
        """The mixture."""
        appearances, masks, shares = self._given
        return InstantMixture.between(self.picture, appearances, self.backbone, shares, self.settings, self.mask, masks)
