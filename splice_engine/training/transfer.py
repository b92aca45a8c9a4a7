"""Semantic appearance transfer: a generator is trained on one pair of pictures (paper, section 3)."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import SpliceError
from ..images import check_mask, check_picture, resize, short_side_size, sides
from ..masks import composite
from ..matching.filters import with_coarse_chroma
from ..presets import DEFAULT_PRESET, PRESETS
from ..settings import InstantSettings, RefinementSettings, Settings
from ..vit.backbone import Backbone
from ..vit.precision import fast_fp32
from .crops import CropSampler
from .generator import Generator
from .losses import recipe_terms
from .objective import Objective
from .pair import Pair, add_noise_if_flat, to_training_size
from .refinement import Refinement
from .rendering import render
from .run import Run, Step, make_forward, move_parts
from .splicing import Splicing
from .warm_start import WARM_SEED, WarmStart

COARSE_SIDE = 64
"""Short side in pixels of what the recipe changes in a refined picture."""


class Transfer(Run):
    """A run on one pair: iterate to train, leave the loop to stop, take the picture whenever you like.

        for step in (run := Transfer(structure, appearance, backbone)):
            print(step.index, step.total.item())
        result = run.image()

    Leaving the loop loses nothing: `image()` renders what has been learnt, a new loop goes on. Work begins in the loop.

    Args:
        structure: `[1, 3, H, W]` in 0..1: its structure is kept.
        appearance: `[1, 3, H', W']` in 0..1: its appearance is transferred. The sizes may differ.
        backbone: The frozen ViT of the losses and of the matching; the run takes place on its device.
        settings: The recipe.
        objective: Replaces the recipe's own terms.
        structure_mask: `[1, 1, H, W]` in 0..1, of any size: where the picture may change. Of A, the terms compare only
            what it covers.
        appearance_mask: Likewise: the part of B that is the appearance.
        generator: Training starts from a copy of it and of its picture alone, in place of a warm start and residual.

    Attributes:
        settings: The recipe as it is run.
        step: Steps taken so far.
        appearances: The appearance pictures, of which there is one; see `MixtureTransfer`.
        appearance_masks: Their masks.
        shares: How much each counts; the sum is 1.

    Raises:
        SpliceError: A picture, a mask or an objective that cannot be worked with.
    """

    def __init__(
        self,
        structure: Tensor,
        appearance: Tensor,
        backbone: Backbone,
        settings: Settings = PRESETS[DEFAULT_PRESET],
        objective: Objective | None = None,
        structure_mask: Tensor | None = None,
        appearance_mask: Tensor | None = None,
        generator: Generator | None = None,
    ) -> None:
        if generator is not None:
            settings = replace(settings, refine_steps=0, warm_steps=0, residual=0.0)  # its own picture is the start
        self.backbone = backbone
        self.device = backbone.device
        self.picture = check_picture(structure, "structure picture")
        self.appearance = check_picture(appearance, "appearance picture")
        self.mask, self.appearance_mask = (
            None if mask is None else check_mask(mask, name).to(self.device)
            for mask, name in ((structure_mask, "structure mask"), (appearance_mask, "appearance mask"))
        )
        self.appearances, self.appearance_masks = [self.appearance], [self.appearance_mask]
        self.shares: tuple[float, ...] = (1.0,)
        self.objective = objective or Objective(
            recipe_terms(settings), backbone, settings.vit_size, settings.vit_longest, settings.recompute
        )
        if self.objective.needs_whole_pictures:
            self.objective.check_grids(to_training_size(self.picture, settings.size))
            settings = replace(settings, whole=1.0, flip=0.0)
        self.settings = settings
        self._starts_from_noise = generator is None and settings.warm_steps == 0
        seed = WARM_SEED if settings.warm_steps else settings.seed
        start = Generator(seed=seed) if generator is None else copy.deepcopy(generator)
        start.finished = None  # of the pair that it was trained on before
        self._trained = start.to(self.device)
        short = min(sides(self.picture))
        trained_at = short if settings.size is None else min(settings.size, short)
        self._trained.metadata.update(size=trained_at, backbone=backbone.name)
        self._average: AveragedModel | None = None
        if settings.ema:
            self._average = AveragedModel(self._trained, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
            self._average.update_parameters(self._trained)  # the first call copies
        self._sampler = CropSampler(settings, torch.Generator().manual_seed(settings.seed))
        self._forward = make_forward(self._trained, settings.compile, settings.recompute)
        self.step = 0

    @property
    def generator(self) -> Generator:
        """The network that makes the picture: the one in training, or its moving average where that is on."""
        if self._average is None:
            return self._trained
        average = self._average.module
        assert isinstance(average, Generator)
        return average

    @property
    def steps(self) -> int:
        """Steps of the whole run, those of refinement and warm start included."""
        return self.settings.all_steps

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.steps:
            phase = self._phase
            with fast_fp32() if self.device.type == "cpu" else nullcontext():
                total, losses = phase.take_step()
            if self._average is not None and not isinstance(phase, Refinement):
                self._average.update_parameters(self._trained)
            self.step += 1
            yield Step(self.step - 1, total, losses)

    @property
    def _phase(self) -> Refinement | WarmStart | Splicing:
        """What takes the next step."""
        if self.step < self.settings.refine_steps:
            return self.refinement
        return self._warm_start if self.step < self.settings.steps_before else self._splicing

    def begin_like(self, other: "Transfer") -> None:
        """Takes over what another run has done before the recipe's first step, where only their seeds differ."""
        self.pair, self.refinement, self.step = other.pair, other.refinement, other.step
        if self.settings.warm_steps:
            self._trained.load_state_dict(other._trained.state_dict())
            if self._average is not None and other._average is not None:
                self._average.load_state_dict(other._average.state_dict())

    def extend(self, until: int) -> None:
        """Lets the run go on until it has taken so many steps, past its recipe's at the learning rate of its end."""
        self.settings = replace(self.settings, steps=until - self.settings.steps_before)

    def end_at(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Ends the run as it was after fewer steps, with the weights that its generator had then."""
        self.generator.load_state_dict(weights)
        self.extend(step)
        self.step = step

    def image(self, size: int | None = None) -> Tensor:
        """The picture so far: the generator applied to the whole structure picture, its output laid into the mask.

        A share of residual adds what the generator lacks of the matched image, from the first step of the recipe on
        what it lacked then; coarse chroma is then the matched image's. Over a refined one only the coarse part of what
        the recipe changes is laid: its fine part has lines along which the generator is steep. Past the mask and its
        feather the picture is exactly the structure picture.

        Args:
            size: Short side in pixels; None renders at the structure picture's full size.

        Returns:
            `[1, 3, H, W]` in 0..1, on the run's device.

        Raises:
            SpliceError: The run has diverged, so that there is no picture.
        """
        picture = self.picture.to(self.device)
        if size is not None:
            picture = resize(picture, short_side_size(*sides(picture), size))
        given = add_noise_if_flat(picture)
        result = render(self.generator, given, size=self.settings.size)
        if not torch.isfinite(result).all():
            raise SpliceError(f"the run has diverged by step {self.step}: lower the learning rate, or try another seed")
        if self.settings.residual:
            matched = self.refinement.painted(size)
            whole = matched
            if self.step > self.settings.steps_before:
                change = result - render(self._reference, given, size=self.settings.size)
                if self.settings.refine_steps:
                    small = short_side_size(*sides(change), min(COARSE_SIDE, *sides(change)))
                    change = resize(resize(change, small), sides(change))
                whole = change.add_(matched)
            result = with_coarse_chroma(result.lerp_(whole, self.settings.residual), matched).clamp_(0, 1)
        feather = self.settings.feather * min(sides(picture)) / min(sides(self.picture))
        return result if self.mask is None else composite(picture, result, self.mask, feather)

    def end(self, device: str | torch.device) -> None:
        """Moves what `image` needs to a device and frees what only steps need: none can be taken any more."""
        for name in ("pair", "_warm_start", "_splicing", "_sampler"):
            vars(self).pop(name, None)
        self._trained.zero_grad()
        self.device = torch.device(device)
        if "refinement" in vars(self):
            self.refinement.end(self.device)
        move_parts(vars(self), ("mask", "_trained", "_average", "_reference"), self.device)

    @cached_property
    def pair(self) -> Pair:
        """The pictures and masks at training size."""
        structure, appearance = (
            to_training_size(picture, self.settings.size).to(self.device) for picture in (self.picture, self.appearance)
        )
        needs_matched = self.settings.warm_steps or self.settings.residual or self.objective.needs_matched
        at = sides(structure)
        return Pair(
            structure,
            appearance,
            resize(self.refinement.painted(min(at)), at) if needs_matched else None,
            None if self.mask is None else resize(self.mask, at),
            None if self.appearance_mask is None else resize(self.appearance_mask, sides(appearance)),
        )

    @cached_property
    def refinement(self) -> Refinement:
        """What paints the matched image: the instant transfer, refined where the recipe says so.

        Its random draws are the same for all seeds, so that runs of one pair can share it.
        """
        return Refinement(
            self.picture,
            self.appearance,
            self.backbone,
            self.refinement_settings,
            self.mask,
            self.appearance_mask,
        )

    @property
    def refinement_settings(self) -> RefinementSettings:
        """What the recipe says of the matched image."""
        settings = {item.name: getattr(self.settings, item.name) for item in fields(InstantSettings)}
        return RefinementSettings(**settings, steps=self.settings.refine_steps, recompute=self.settings.recompute)

    @cached_property
    def _reference(self) -> Generator:
        """The generator as the recipe finds it."""
        return copy.deepcopy(self._trained)

    @cached_property
    def _warm_start(self) -> WarmStart:
        return WarmStart(self._trained, self._forward, self.pair, self.objective.backbone, self.settings)

    @cached_property
    def _splicing(self) -> Splicing:
        residual = None
        if self.settings.residual:
            assert self.pair.matched is not None
            with torch.no_grad():
                residual = self.settings.residual * (self.pair.matched - self._reference(self.pair.structure))
        parts = (self._trained, self._forward, self.objective, self.pair, self._sampler, self.settings)
        return Splicing(*parts, residual, appearance_first=self._starts_from_noise)
