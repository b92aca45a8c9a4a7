"""The losses: what the output must share with the structure picture and with the appearance picture.

Streams of pictures take part in a step. With G the generator, a a view of the structure picture and b one of the
appearance picture: "output" is G(a), "reconstruction" is G(b), "structure" is a, "appearance" is b, and "palette" is
the same view as a of the painted picture.

A mask of the view a limits what the terms see of the streams that show it, one of b likewise.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, Request
from .errors import SpliceError
from .features import cosine_similarity_matrix
from .images import resize, sides
from .masks import covered_patches

VIT_SIZE = 224
"""Short side in pixels at which the ViT sees a picture (paper, section 4)."""

VIT_LONGEST = 480
"""Most pixels of its long side."""

VIEWS = {
    "output": "structure",
    "structure": "structure",
    "palette": "structure",
    "reconstruction": "appearance",
    "appearance": "appearance",
}
"""Whose view each stream shows, and so whose mask it has."""


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One weighted loss between an output of the generator and its target.

    Attributes:
        weight: Factor of the loss in the objective's total.
    """

    weight: float = 1.0

    name: ClassVar[str]
    output: ClassVar[str]
    target: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class FeatureTerm(Term):
    """A loss between what a block of a ViT sees in the output and in the target.

    Attributes:
        layer: Index of the block, 0 the first, -1 the last.
        backbone: The ViT that judges; None takes the objective's own.
        fixed: What to compare with in place of what the ViT sees in the target stream, as `compared` gives it.
    """

    layer: int = -1
    backbone: Backbone | None = None
    fixed: Tensor | None = None

    facet: ClassVar[str]
    placed: ClassVar[bool]
    """Whether what is compared belongs to places in the picture, so that a fixed target fits one view alone."""

    @property
    def request(self) -> Request:
        """What is read from the ViT for this term."""
        return Request(self.layer, self.facet)

    def compared(self, seen: Tensor, backbone: Backbone) -> Tensor:
        """What of a tensor of this term's facet is compared."""
        return seen

    def distance(self, output: Tensor, target: Tensor, backbone: Backbone) -> Tensor:
        """The unweighted loss, a scalar, between two tensors of this term's facet."""
        with torch.no_grad():
            aim = self.compared(target, backbone)
        return F.mse_loss(self.compared(output, backbone), aim)

    def distance_to_fixed(self, output: Tensor, backbone: Backbone) -> Tensor:
        """The unweighted loss, a scalar, between a tensor of this term's facet and the fixed target.

        Raises:
            SpliceError: They differ in shape.
        """
        assert self.fixed is not None
        seen = self.compared(output, backbone)
        if seen.shape != self.fixed.shape:
            raise SpliceError(
                f"the fixed target of the {self.name} term has shape {list(self.fixed.shape)}, but {backbone.name} "
                f"sees the output as {list(seen.shape)}: take it from the structure picture, same backbone and size"
            )
        return F.mse_loss(seen, self.fixed.to(seen))

    def loss(self, backbone: Backbone, output: Tensor, target: Tensor, size: int | None = VIT_SIZE) -> Tensor:
        """The unweighted loss, a scalar, between two pictures; differentiable in `output`.

        Args:
            backbone: The ViT, unless the term has its own.
            output: `[B, 3, H, W]` in 0..1.
            target: Likewise.
            size: Short side at which the ViT sees them; None leaves them as they are, to the nearest patch.
        """
        backbone = self.backbone or backbone
        seen = backbone(resize(output, _grid_size(backbone, output, size)), [self.request])
        with torch.no_grad():
            aim = backbone(resize(target, _grid_size(backbone, target, size)), [self.request])
        return self.distance(seen[self.request], aim[self.request], backbone)


@dataclass(frozen=True, kw_only=True)
class PictureTerm(Term):
    """A loss between the pixels of two pictures of one size."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The unweighted loss, a scalar, between two pictures `[B, 3, H, W]`, weighted by a mask `[1, 1, H, W]`."""


@dataclass(frozen=True, kw_only=True)
class Appearance(FeatureTerm):
    """Mean squared difference of the [CLS] tokens of G(a) and b (paper, equation 4)."""

    weight: float = 10.0
    name: ClassVar[str] = "appearance"
    facet: ClassVar[str] = "cls"
    placed: ClassVar[bool] = False
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "appearance"


@dataclass(frozen=True, kw_only=True)
class Structure(FeatureTerm):
    """Mean squared difference of the keys' self-similarities of G(a) and a (paper, equation 5)."""

    name: ClassVar[str] = "structure"
    facet: ClassVar[str] = "key"
    placed: ClassVar[bool] = True
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "structure"

    def compared(self, seen: Tensor, backbone: Backbone) -> Tensor:
        if backbone.prefix > 1:  # registers belong to no place in the picture
            seen = torch.cat([seen[:, :1], seen[:, backbone.prefix :]], dim=1)
        return cosine_similarity_matrix(seen)


@dataclass(frozen=True, kw_only=True)
class Identity(FeatureTerm):
    """Mean squared difference of the keys of G(b) and b (paper, equation 6)."""

    name: ClassVar[str] = "identity"
    facet: ClassVar[str] = "key"
    placed: ClassVar[bool] = True
    output: ClassVar[str] = "reconstruction"
    target: ClassVar[str] = "appearance"


@dataclass(frozen=True, kw_only=True)
class Colour(PictureTerm):
    """Mean squared difference of the low-pass colours of G(a) and of the painted view that semantic matching gives.

    It holds the output's colours where they belong while the [CLS] token, which knows no place, moves them.

    Attributes:
        cell: Side of the squares of pixels whose means are compared.
    """

    cell: int = 16
    name: ClassVar[str] = "colour"
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "palette"

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        difference, share = _cell_means(output - target, self.cell, mask)
        return _mean(difference.square(), share)


@dataclass(frozen=True, kw_only=True)
class Contrast(PictureTerm):
    """Mean squared difference of the local contrasts of G(a) and of the painted view: standard deviations in squares.

    It keeps texture at its strength, which losses between pixels fade wherever they cannot place it.

    Attributes:
        cell: Side of the squares in pixels.
    """

    cell: int = 16
    name: ClassVar[str] = "contrast"
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "palette"

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        deviations = []
        for picture in (output, target):
            mean, share = _cell_means(picture, self.cell, mask)
            square, _ = _cell_means(picture.square(), self.cell, mask)
            deviations.append((square - mean.square()).clamp_min(1e-6).sqrt())
        return _mean((deviations[0] - deviations[1]).square(), share)


@dataclass(frozen=True, kw_only=True)
class Reconstruction(PictureTerm):
    """Mean absolute difference of G(b) and b: the generator keeps B's own colours and texture."""

    name: ClassVar[str] = "reconstruction"
    output: ClassVar[str] = "reconstruction"
    target: ClassVar[str] = "appearance"

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mean((output - target).abs(), mask)


@dataclass(frozen=True, kw_only=True)
class Painting(PictureTerm):
    """Mean absolute difference of G(a) and the painted view that semantic matching gives."""

    name: ClassVar[str] = "painting"
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "palette"

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mean((output - target).abs(), mask)


Targets = dict[tuple[str, FeatureTerm], Tensor]
"""What a ViT sees, by stream and by the term that compares it."""


class Objective:
    """A sum of weighted terms, evaluated with as few passes through the ViTs as the pictures' sizes allow.

    Args:
        terms: The losses. Two of one kind are told apart as "structure", "structure_2", …
        backbone: The ViT of all terms that name none.
        size: Short side in pixels at which a ViT sees pictures.
        longest: Upper limit of the long side.
        recompute: Compute a ViT's blocks once more in the backward pass instead of keeping what they computed.

    Raises:
        SpliceError: A term looks at a block that its ViT does not have.
    """

    def __init__(
        self,
        terms: Iterable[Term],
        backbone: Backbone,
        size: int = VIT_SIZE,
        longest: int = VIT_LONGEST,
        recompute: bool = False,
    ) -> None:
        self.backbone = backbone
        self.size = size
        self.longest = longest
        self.recompute = recompute
        self.terms: dict[str, Term] = {}
        for term in terms:
            count = sum(other.name == term.name for other in self.terms.values())
            self.terms[term.name if not count else f"{term.name}_{count + 1}"] = term
            if isinstance(term, FeatureTerm):
                self._judge(term).resolve(term.layer)

    def targets(
        self,
        pictures: Mapping[str, Tensor],
        names: Sequence[str] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> Targets:
        """What the ViTs see in the streams that outputs are compared with; arguments as for `losses`.

        Views that come again need it once: it goes into `losses` in the place of another pass.
        """
        felt = [
            (term.target, term) for term in self._felt(names).values() if term.fixed is None and term.target in pictures
        ]
        with torch.no_grad():
            return self._read(pictures, felt, masks or {})

    def losses(
        self,
        pictures: Mapping[str, Tensor],
        names: Sequence[str] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        targets: Targets | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted losses of the terms whose streams are all given.

        Args:
            pictures: Streams by name, each `[B, 3, H, W]` in 0..1.
            names: Only these terms.
            masks: `[1, 1, H, W]` in 0..1 by the view that they belong to, "structure" or "appearance". The ViT sees
                only the patches that a mask covers at least half; terms between pixels weigh them by it.
            targets: What `targets` gave for these streams and masks; None looks now.
        """
        masks = masks or {}
        terms = {
            name: term
            for name, term in self.terms.items()
            if term.output in pictures and term.target in pictures and (names is None or name in names)
        }
        felt = {name: term for name, term in self._felt(names).items() if name in terms}
        outputs = self._read(pictures, [(term.output, term) for term in felt.values()], masks)
        if targets is None:
            targets = self.targets(pictures, list(felt), masks)
        losses = {}
        for name, term in terms.items():
            if isinstance(term, FeatureTerm):
                seen, judge = outputs[term.output, term], self._judge(term)
                if term.fixed is None:
                    losses[name] = term.distance(seen, targets[term.target, term], judge)
                else:
                    losses[name] = term.distance_to_fixed(seen, judge)
            elif isinstance(term, PictureTerm):
                mask = masks.get(VIEWS[term.output])
                losses[name] = term.loss(pictures[term.output], pictures[term.target], mask)
        return losses

    def total(self, losses: Mapping[str, Tensor], fade: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of losses by their terms' names; `fade` holds further factors for some of them."""
        fade = fade or {}
        return torch.stack(
            [self.terms[name].weight * fade.get(name, 1.0) * loss for name, loss in losses.items()]
        ).sum()

    def _felt(self, names: Sequence[str] | None) -> dict[str, FeatureTerm]:
        """The terms that a ViT judges, of those with the given names."""
        return {
            name: term
            for name, term in self.terms.items()
            if isinstance(term, FeatureTerm) and (names is None or name in names)
        }

    def _judge(self, term: FeatureTerm) -> Backbone:
        return term.backbone or self.backbone

    def _read(
        self, pictures: Mapping[str, Tensor], wanted: list[tuple[str, FeatureTerm]], masks: Mapping[str, Tensor]
    ) -> Targets:
        """What each term sees in its stream. Streams that reach one ViT at one size with one mask share a pass."""
        passes: dict[tuple[Backbone, tuple[int, int], str | None], dict[str, set[Request]]] = {}
        for stream, term in wanted:
            judge = self._judge(term)
            size = _grid_size(judge, pictures[stream], self.size, self.longest)
            key = (judge, size, VIEWS[stream] if VIEWS[stream] in masks else None)
            passes.setdefault(key, {}).setdefault(stream, set()).add(term.request)
        seen: dict[tuple[str, Backbone, Request], Tensor] = {}
        for (judge, size, view), streams in passes.items():
            parts = [resize(pictures[stream], size) for stream in streams]
            tokens = None if view is None else covered_patches(masks[view], size, judge.patch)
            answer = judge(torch.cat(parts), set().union(*streams.values()), tokens, self.recompute)
            for request, tensor in answer.items():
                split = tensor.split([len(part) for part in parts])
                seen.update({(stream, judge, request): piece for stream, piece in zip(streams, split, strict=True)})
        return {(stream, term): seen[stream, self._judge(term), term.request] for stream, term in wanted}


def _cell_means(values: Tensor, cell: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Means of `[B, C, H, W]` over squares of pixels, and the share of each that a mask `[1, 1, H, W]` covers."""
    if mask is None:
        return F.avg_pool2d(values, cell), None
    share = F.avg_pool2d(mask, cell, ceil_mode=True)  # the mask may lie in the last, incomplete cells
    return F.avg_pool2d(values * mask, cell, ceil_mode=True) / share.clamp_min(1e-6), share


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of `[B, C, H, W]`, weighted by `[1, 1, H, W]` where that is given."""
    return values.mean() if weights is None else (values * weights).sum() / weights.expand_as(values).sum()


def _grid_size(
    backbone: Backbone, picture: Tensor, size: int | None, longest: int | None = VIT_LONGEST
) -> tuple[int, int]:
    return backbone.grid_size(*sides(picture), short=size, longest=None if size is None else longest)
