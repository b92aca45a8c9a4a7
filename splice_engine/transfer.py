"""Semantic appearance transfer: a generator is trained on one pair of pictures (paper, section 3)."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone
from .errors import SpliceError
from .gemm import fast_fp32
from .generator import Generator
from .images import check_mask, check_picture, resize, short_side_size, sides
from .masks import composite
from .objective import (
    Appearance,
    Colour,
    Contrast,
    FeatureTerm,
    Identity,
    Objective,
    Painting,
    Reconstruction,
    Structure,
    Targets,
    Term,
)
from .palette import Palette
from .rendering import render
from .settings import DEFAULT_PRESET, PRESETS, Settings
from .views import MIN_CROP, Views

FLAT = 1e-3
"""Standard deviation of the channels up to which a picture is of one colour: a quarter of a step of 8 bits."""


@dataclass(frozen=True)
class Step:
    """One step of a run. Its numbers are still on the device: reading them as floats waits for it.

    Attributes:
        index: 0 the first.
        total: The weighted sum that was minimised, a scalar.
        losses: The unweighted losses by name; those of the whole structure picture begin with "whole_".
    """

    index: int
    total: Tensor
    losses: dict[str, Tensor]

    def floats(self) -> dict[str, float]:
        """Total and losses as plain numbers."""
        return {"total": self.total.item(), **{name: loss.item() for name, loss in self.losses.items()}}


@dataclass
class View:
    """What one view of a picture brings to a step.

    Attributes:
        streams: Pictures `[1, 3, h, w]` by name, as the objective takes them.
        masks: `[1, 1, h, w]` by the view that they belong to.
        targets: What the ViTs see in the streams; empty until they have looked.
    """

    streams: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    targets: Targets = field(default_factory=dict)


def recipe_terms(settings: Settings) -> list[Term]:
    """The losses of a recipe: those with a weight above 0."""
    terms: tuple[Term, ...] = (
        Appearance(weight=settings.appearance_weight, layer=settings.layer),
        Structure(weight=settings.structure_weight, layer=settings.layer),
        Identity(weight=settings.identity_weight, layer=settings.layer),
        Colour(weight=settings.colour_weight),
        Contrast(weight=settings.contrast_weight),
        Painting(weight=settings.painting_weight),
        Reconstruction(weight=settings.reconstruction_weight),
    )
    return [term for term in terms if term.weight > 0]


class Transfer:
    """A run on one pair: iterate to train, leave the loop to stop, take the picture whenever you like.

        for step in (run := Transfer(structure, appearance, backbone)):
            print(step.index, step.total.item())
        result = run.image()

    Leaving the loop loses nothing: `image()` renders what has been learnt, and a new loop goes on from there.

    Args:
        structure: `[1, 3, H, W]` in 0..1: its structure is kept.
        appearance: `[1, 3, H', W']` in 0..1: its look is given. The sizes may differ.
        backbone: The frozen ViT that judges; the run takes place on its device.
        settings: The recipe.
        objective: Replaces the recipe's own terms.
        structure_mask: `[1, 1, H, W]` in 0..1, of any size: where the picture may change. Of A, the terms see only what
            it covers.
        appearance_mask: Likewise: the part of B that is the appearance.
        generator: Training sets out from a copy of it and of its picture alone, in the place of a warm start and of the
            residual.

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
            settings = replace(settings, warm_steps=0, residual=0.0)  # its own picture is where the run begins
        self.settings = settings
        self.device = backbone.device
        self.picture = check_picture(structure, "structure picture")
        appearance = check_picture(appearance, "appearance picture")
        self.structure = self._at_training_size(self.picture)
        self.appearance = self._at_training_size(appearance)
        self.mask = None if structure_mask is None else check_mask(structure_mask, "structure mask").to(self.device)
        self.structure_mask = None if self.mask is None else resize(self.mask, sides(self.structure))
        self.appearance_mask: Tensor | None = None
        if appearance_mask is not None:
            appearance_mask = check_mask(appearance_mask, "appearance mask").to(self.device)
            self.appearance_mask = resize(appearance_mask, sides(self.appearance))
        self.objective = objective or Objective(
            recipe_terms(settings), backbone, settings.vit_size, settings.vit_longest, settings.recompute
        )
        fixed = [
            term for term in self.objective.terms.values() if isinstance(term, FeatureTerm) and term.fixed is not None
        ]
        if any(term.output == "reconstruction" for term in fixed):
            raise SpliceError("the identity term compares random crops of the appearance, so it takes no fixed target")
        if any(term.placed for term in fixed):  # it fits the whole picture only
            settings = replace(settings, whole=1.0, flip=0.0)
        if not self.objective.terms:
            raise SpliceError("the objective has no term: give at least one of the weights a value above 0")
        self.palette: Tensor | None = None
        self._residual: Tensor | None = None
        self._beginner: Generator | None = None
        if (
            settings.warm_steps
            or settings.residual
            or any(term.target == "palette" for term in self.objective.terms.values())
        ):
            palette = Palette.between(
                self.picture,
                appearance,
                backbone,
                structure_mask=structure_mask,
                appearance_mask=appearance_mask,
                looks=settings.looks,
            )
            at = sides(self.structure)
            self.palette = resize(palette.painted(min(at)), at)
            self._painted = palette.painted
        start = Generator(seed=settings.seed) if generator is None else copy.deepcopy(generator)
        self._trained = start.to(self.device)
        self._trained.metadata.update(size=settings.size, backbone=backbone.name)
        self.step = 0
        self._begun = generator is not None or settings.warm_steps > 0
        self._average = copy.deepcopy(self._trained) if settings.ema else None
        self._views = Views(settings, torch.Generator().manual_seed(settings.seed))
        self._recurring: dict[str, dict[int, View]] = {"structure": {}, "appearance": {}}
        self._forward = torch.compile(self._trained, dynamic=True) if settings.compile else self._trained
        if settings.recompute:
            self._forward = partial(checkpoint, self._forward, use_reentrant=False, preserve_rng_state=False)
        weights = list(self._trained.parameters())
        self._optimizer = torch.optim.Adam(weights, settings.learning_rate, betas=(settings.beta1, settings.beta2))
        self._decay = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, 1.0, settings.learning_rate_end, total_iters=settings.steps - 1
        )
        if settings.warm_steps:
            highest = settings.warm_learning_rate
            self._warm_objective = Objective([Painting(), Reconstruction()], backbone)
            self._warm_optimizer = torch.optim.Adam(weights, highest)
            self._warm_cycle = torch.optim.lr_scheduler.OneCycleLR(
                self._warm_optimizer, highest, total_steps=settings.warm_steps
            )

    @property
    def generator(self) -> Generator:
        """The network that makes the picture: the one in training, or its running average where that is on."""
        return self._average or self._trained

    @property
    def steps(self) -> int:
        """Steps of the whole run, those of the warm start included."""
        return self.settings.all_steps

    def __len__(self) -> int:
        """Steps that are left."""
        return max(0, self.steps - self.step)

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.steps:
            with fast_fp32() if self.device.type == "cpu" else nullcontext():
                total, losses = self._warm_up() if self.step < self.settings.warm_steps else self._learn()
            if self._average is not None:
                self._update_average(self._average)
            self.step += 1
            yield Step(self.step - 1, total, losses)

    def image(self, size: int | None = None) -> Tensor:
        """The picture so far: the generator applied to the whole structure picture, its output laid into the mask.

        Where the recipe has a share of residual, that lies over the output: what the generator had not learnt of the
        instant picture when the recipe began.

        Past the mask and its feather the picture is exactly the structure picture.

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
        seen = grained(picture)
        result = render(self.generator, seen, size=self.settings.size)
        if not torch.isfinite(result).all():
            raise SpliceError(f"the run has diverged by step {self.step}: lower the learning rate, or try another seed")
        if self._beginner is not None:
            missed = self._painted(size).sub_(render(self._beginner, seen, size=self.settings.size))
            result = result.add_(missed, alpha=self.settings.residual).clamp_(0, 1)
        if self.mask is None:
            return result
        scale = min(sides(picture)) / min(sides(self.picture))
        return composite(picture, result, self.mask, self.settings.feather * scale)

    def _warm_up(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step towards the instant picture; no ViT takes part.

        It is learnt as it stands, without crops or flips: half as many steps reach as far, and those come later.
        """
        assert self.palette is not None
        coarse = self.step < self.settings.warm_coarse * self.settings.warm_steps
        streams, masks = {"structure": self.structure, "palette": self.palette}, {}
        if self.structure_mask is not None:
            masks["structure"] = self.structure_mask
        if self.step % self.settings.anchor_every == 0:
            b = self._view_of_appearance()
            streams, masks = {**streams, **b.streams}, {**masks, **b.masks}
        if coarse:
            streams, masks = _halved(streams), _halved(masks)
        streams["output"] = self._forward(streams["structure"])
        if "appearance" in streams:
            streams["reconstruction"] = self._forward(streams["appearance"])
        self._warm_optimizer.zero_grad(set_to_none=True)
        total, losses = self._descend(self._warm_objective, streams, masks)
        self._warm_optimizer.step()
        self._warm_cycle.step()
        return total, losses

    def _learn(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the recipe."""
        settings, index = self.settings, self.step - self.settings.warm_steps
        if settings.residual and self._beginner is None:
            self._begin()
        first = index == 0 and not self._begun and "appearance" in self.objective.terms
        names = ["appearance"] if first else None  # so the recipe begins
        fade = {"colour": 1 + (settings.colour_end - 1) * index / max(1, settings.steps - 1)}
        a, b = self._view("structure"), self._view("appearance")
        streams = {**a.streams, **b.streams}
        streams["output"] = self._output(streams["structure"], streams.pop("residual", None))
        anchors_only = all(term.output == "reconstruction" for term in self.objective.terms.values())
        if not first and (anchors_only or index % settings.anchor_every == 0):
            streams["reconstruction"] = self._forward(streams["appearance"])
        masks = {**a.masks, **b.masks}
        self._read_targets([a, b], None if settings.views else names)
        self._optimizer.zero_grad(set_to_none=True)
        total, losses = self._descend(self.objective, streams, masks, names, fade, {**a.targets, **b.targets})
        judged = any(t.output == "output" and t.target != "palette" for t in self.objective.terms.values())
        if judged and settings.whole_every and index % settings.whole_every == 0:
            # A backward pass of its own: the same sum of gradients, without both graphs in memory at once.
            whole_output = self._output(self.structure, self._residual)
            streams = {"output": whole_output, "structure": self.structure, "appearance": streams["appearance"]}
            if self.structure_mask is not None:
                masks = {**masks, "structure": self.structure_mask}
            whole_total, whole = self._descend(self.objective, streams, masks, names)
            total = total + whole_total
            losses.update({f"whole_{name}": loss for name, loss in whole.items()})
        self._optimizer.step()
        self._decay.step()
        return total, losses

    def _view(self, of: str) -> View:
        """A view of the "structure" or the "appearance" picture: a new one, or one of those that recur."""
        draw = self._view_of_structure if of == "structure" else self._view_of_appearance
        if not self.settings.views:
            return draw()
        recurring = self._recurring[of]
        index = self._views.pick(self.settings.views)
        if index not in recurring:
            recurring[index] = draw()
        return recurring[index]

    def _read_targets(self, views: Sequence[View], names: Sequence[str] | None) -> None:
        """Lets the ViT look at those views that it has not seen yet, in one pass where their sizes allow it."""
        new = [view for view in views if not view.targets]
        streams = {name: picture for view in new for name, picture in view.streams.items()}
        masks = {name: mask for view in new for name, mask in view.masks.items()}
        targets = self.objective.targets(streams, names, masks)
        for view in new:
            view.targets = {key: seen for key, seen in targets.items() if key[0] in view.streams}

    def _view_of_structure(self) -> View:
        """A view of the structure picture, the same view of the instant picture, and of what lies over the output."""
        everything = {
            "structure": self.structure,
            "palette": self.palette,
            "residual": self._residual,
            "mask": self.structure_mask,
        }
        layers = {name: layer for name, layer in everything.items() if layer is not None}
        whole = torch.cat(list(layers.values()), dim=1)
        view = self._views.crop_or_whole(whole, self.structure_mask)
        parts = view.split([layer.shape[1] for layer in layers.values()], dim=1)
        streams = dict(zip(layers, parts, strict=True))
        masks = {"structure": streams.pop("mask")} if "mask" in streams else {}
        streams["structure"] = self._views.disturb(streams["structure"])
        return View(streams, masks)

    @torch.no_grad()
    def _begin(self) -> None:
        """Keeps the generator as the recipe finds it. What it lacks of the instant picture lies over it from here on.

        So the recipe sets out from the whole of that picture, and the generator has to learn the changes only.
        """
        assert self.palette is not None
        self._beginner = copy.deepcopy(self._trained)
        self._residual = self.settings.residual * (self.palette - self._beginner(self.structure))

    def _output(self, view: Tensor, residual: Tensor | None) -> Tensor:
        """The generator's output for a view, and the residual over it."""
        output = self._forward(view)
        return output if residual is None else (output + residual).clamp(0, 1)

    def _view_of_appearance(self) -> View:
        """A view of the appearance picture, and of its mask."""
        if self.appearance_mask is None:
            return View({"appearance": self._views.crop(self.appearance)})
        view = self._views.crop(torch.cat([self.appearance, self.appearance_mask], dim=1), self.appearance_mask)
        return View({"appearance": view[:, :3]}, {"appearance": view[:, 3:]})

    @staticmethod
    def _descend(
        objective: Objective,
        streams: dict[str, Tensor],
        masks: dict[str, Tensor],
        names: Sequence[str] | None = None,
        fade: dict[str, float] | None = None,
        targets: Targets | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds an objective's gradients to the generator's; returns its total and losses."""
        losses = objective.losses(streams, names, masks, targets)
        total = objective.total(losses, fade)
        total.backward()
        return total.detach(), {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def _update_average(self, average: Generator) -> None:
        torch._foreach_lerp_(list(average.parameters()), list(self._trained.parameters()), 1 - self.settings.ema)

    def _at_training_size(self, picture: Tensor) -> Tensor:
        height, width = sides(picture)
        size = self.settings.size
        if size is not None and size < min(height, width):
            picture = resize(picture, short_side_size(height, width, size))
        return grained(picture).to(self.device)


def grained(picture: Tensor) -> Tensor:
    """A picture of one colour with a grain far too faint to be seen; any other as it is.

    In the former the generator's normalisation finds nothing to divide by, so that each layer makes gradients a few
    hundred times larger, until none is a number.
    """
    if picture.std(dim=(-2, -1)).max() > FLAT:
        return picture
    grain = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return picture + FLAT * grain.to(picture)


def _halved(pictures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pictures at half their size, save those that the generator could not halve any further then."""
    return {
        name: resize(picture, (picture.shape[-2] // 2, picture.shape[-1] // 2))
        if min(sides(picture)) >= 2 * MIN_CROP
        else picture
        for name, picture in pictures.items()
    }
