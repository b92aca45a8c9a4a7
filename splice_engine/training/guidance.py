"""Guidance of a diffusion sampler by an objective: in each step what it predicts is moved towards the targets.

The loss compares the decoded prediction x0 with the pictures of a guide. Its gradient goes through the decoder and the
ViT, never through the diffusion model. (Losses of DINO features in a sampler: Kwon and Ye, "Diffusion-based Image
Translation using Disentangled Style and Content Representation", 2023; gradients at the predicted x0: Bansal et al.,
"Universal Guidance for Diffusion Models", 2023.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import SpliceError
from ..images import check_mask, check_picture, resize, short_side_size, sides
from ..masks import covered
from ..settings import GUIDANCE_GROUPS, GuidanceSettings
from .objective import Objective, Pictures, Targets


@dataclass(frozen=True)
class Decoder:
    """How a latent becomes a picture.

    Attributes:
        decode: A differentiable function of a latent `[1, C, h, w]`, float32, to a picture
            `[1, 3, scale·h, scale·w]` in 0..1. It need not clamp: a pixel that is clamped has no gradient.
        scale: Pixels per cell of the latent and axis.
    """

    decode: Callable[[Tensor], Tensor]
    scale: int = 1


@dataclass(frozen=True)
class Guide:
    """The pictures that guide one latent, on any device; what is None does not guide.

    Attributes:
        structure: `[1, 3, H, W]` in 0..1; the middle of it, at the aspect of the latent.
        appearance: Likewise, of any size and aspect.
        structure_mask: `[1, 1, h, w]` in 0..1, of the structure picture: where the latent is guided.
        appearance_mask: Likewise: the part of the appearance picture that counts.

    Raises:
        SpliceError: A picture or mask that `check_picture` or `check_mask` refuses.
    """

    structure: Tensor | None = None
    appearance: Tensor | None = None
    structure_mask: Tensor | None = None
    appearance_mask: Tensor | None = None

    def __post_init__(self) -> None:
        for what in GUIDANCE_GROUPS:
            picture, mask = getattr(self, what), getattr(self, f"{what}_mask")
            if picture is not None:
                check_picture(picture, f"{what} picture")
            if mask is not None:
                check_mask(mask, f"{what} mask")


class Guidance:
    """Moves a sampler's predictions towards what an objective compares them with.

    Args:
        objective: Its terms of the output guide, each within its group; weights count among the terms of one group.
        guide: The pictures.
        settings: Strengths, windows, steps and the decoder's size.

    Raises:
        SpliceError: No term has a picture or a fixed target to compare with.
    """

    def __init__(
        self,
        objective: Objective,
        guide: Guide,
        settings: GuidanceSettings = GuidanceSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.objective = objective
        self.guide = guide
        self.settings = settings
        self.names: dict[str, list[str]] = {
            group: [
                name
                for name, term in objective.terms.items()
                if term.output == "output"
                and term.target == group
                and (getattr(guide, group) is not None or getattr(term, "fixed", None) is not None)
            ]
            for group in GUIDANCE_GROUPS
        }
        if not any(self.names.values()):
            raise SpliceError(
                "nothing guides the sampler: give a structure picture for the structure term, or an appearance picture "
                "for the appearance term"
            )
        self._prepared: dict[tuple[int, int], tuple[Pictures, Targets]] = {}

    def active(self, done: float, step: int = 0) -> list[str]:
        """The groups that guide a step; arguments as for a call."""
        if step % self.settings.every:
            return []
        groups = []
        for group in GUIDANCE_GROUPS:
            start, end = self.settings.window(group)
            if self.names[group] and self.settings.strength(group) and (start <= done < end or done >= end == 1):
                groups.append(group)
        return groups

    def __call__(self, x0: Tensor, decoder: Decoder, done: float, step: int = 0) -> Tensor:
        """The prediction of one picture, moved.

        Each group's gradient is divided by its root mean square, and the latent moved against it by the group's
        strength times the latent's standard deviation: so the same strength fits every model and term.

        Args:
            x0: What the sampler predicts, `[1, C, h, w]`, in the model's own space.
            decoder: Makes a picture of it, on the backbone's device.
            done: Share of the sampling that is done at this noise level: 0 at the first, 1 at the end.
            step: Index of the sampler's step.

        Returns:
            Like `x0`, which itself is returned where nothing guides.

        Raises:
            SpliceError: The latent or the gradient has values that are not numbers.
        """
        groups = self.active(done, step)
        if not groups:
            return x0
        latent = x0.detach().to(self.objective.backbone.device, torch.float32, copy=True)
        spread = latent.std()
        if not bool(torch.isfinite(spread)):
            raise SpliceError("the latent has values that are not numbers (NaN or infinite): the model made them")
        mask = self._latent_mask(latent)
        count = self.settings.inner_steps
        for index in range(count):
            share = 2 * (count - index) / (count * (count + 1))  # ever smaller steps settle where equal ones overshoot
            for group, gradient in self.gradients(latent, decoder, groups).items():
                latent = latent - share * self.settings.strength(group) * spread * _normalise(gradient, mask)
        return latent.to(x0)

    def gradients(self, x0: Tensor, decoder: Decoder, groups: Sequence[str] = GUIDANCE_GROUPS) -> dict[str, Tensor]:
        """The gradient of each group's weighted sum of losses at a latent.

        Args:
            x0: `[1, C, h, w]`, float32, on the backbone's device.
            decoder: Makes a picture of it.
            groups: Of `GUIDANCE_GROUPS`.

        Returns:
            For each group that has a term, a tensor of the shape of `x0`.
        """
        with torch.enable_grad():
            latent = x0.detach().requires_grad_()
            totals = self._totals(latent, decoder, [group for group in groups if self.names[group]])
            gradients = {}
            for index, (group, total) in enumerate(totals.items(), 1):
                (gradients[group],) = torch.autograd.grad(total, latent, retain_graph=index < len(totals))
        return gradients

    def losses(self, x0: Tensor, decoder: Decoder) -> dict[str, Tensor]:
        """The weighted sum of the losses of each group that has a term, scalars; arguments as for `gradients`."""
        with torch.no_grad():
            return self._totals(x0, decoder, [group for group in GUIDANCE_GROUPS if self.names[group]])

    def _totals(self, latent: Tensor, decoder: Decoder, groups: Sequence[str]) -> dict[str, Tensor]:
        picture = self._decode(latent, decoder)
        if sides(picture) not in self._prepared:
            self._prepared[sides(picture)] = self._prepare(picture)
        pictures, targets = self._prepared[sides(picture)]
        names = [name for group in groups for name in self.names[group]]
        losses = self.objective.losses(replace(pictures, output=picture), names, targets)
        return {group: self.objective.total({name: losses[name] for name in self.names[group]}) for group in groups}

    def _decode(self, latent: Tensor, decoder: Decoder) -> Tensor:
        """The picture of a latent, `[1, 3, H, W]`, at the size at which decoders work at most."""
        most = max(1, self.settings.decode_size // decoder.scale)
        if min(sides(latent)) > most:
            latent = resize(latent, short_side_size(*sides(latent), most))
        return decoder.decode(latent)

    def _prepare(self, picture: Tensor) -> tuple[Pictures, Targets]:
        """What pictures of one size are compared with, and the features of it.

        The guide's pictures are as blurred as the decoded one, so that features differ by what they show alone.
        """
        guide, device, size = self.guide, picture.device, sides(picture)
        structure, appearance = guide.structure, guide.appearance
        if structure is not None:
            structure = _fit(structure.to(device), size)
        if appearance is not None and min(sides(appearance)) > min(size):
            appearance = resize(appearance, short_side_size(*sides(appearance), min(size)))
        mask = self._structure_mask()
        pictures = Pictures(
            # A term with a fixed target compares with no picture, but is left out where its picture is not there.
            structure=picture.detach() if structure is None else structure,
            appearance=picture.detach() if appearance is None else appearance.to(device),
            structure_mask=None if mask is None else _fit(mask.to(device), size),
            appearance_mask=None if guide.appearance_mask is None else guide.appearance_mask.to(device),
        )
        self.objective.check_grids(picture)
        return pictures, self.objective.targets(pictures, [name for names in self.names.values() for name in names])

    def _structure_mask(self) -> Tensor | None:
        """The mask at the size of its picture, where there is one."""
        mask, structure = self.guide.structure_mask, self.guide.structure
        return mask if mask is None or structure is None else resize(mask, sides(structure))

    def _latent_mask(self, latent: Tensor) -> Tensor | None:
        """Where the latent may move, `[1, 1, h, w]` of ones and zeros; None: everywhere."""
        mask = self._structure_mask()
        return None if mask is None else covered(_fit(mask.to(latent.device), sides(latent))).to(latent)


def _fit(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of `[B, C, H, W]` at the aspect of `size` = (height, width), resized to it."""
    height, width = sides(picture)
    share = min(height / size[0], width / size[1])
    rows, columns = (
        max(1, min(side, round(length * share))) for side, length in zip((height, width), size, strict=True)
    )
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize(picture[..., top : top + rows, left : left + columns], size)


def _normalise(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """A gradient divided by its root mean square, of what a mask covers alone.

    Raises:
        SpliceError: It is no number.
    """
    count: float | Tensor = gradient.numel()
    if mask is not None:
        gradient, count = gradient * mask, mask.expand_as(gradient).sum()
    scale = (gradient.square().sum() / count).sqrt()
    if not bool(torch.isfinite(scale)):
        raise SpliceError("the gradient through the decoder is not a number: choose another decoder, or a VAE in fp32")
    return gradient / scale.clamp_min(torch.finfo(gradient.dtype).tiny)
