"""What a loss is: a weighted term of an objective, between features of a ViT or between pixels.

A step compares pictures by name. With G the generator, a a sample of the structure picture and b one of the appearance
picture: "output" is G(a), "reconstruction" is G(b), "structure" is a, "appearance" is b, and "matched" is the same crop
as a of the matched image, which semantic matching paints without training.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError
from ..images import resize, sides
from ..settings import VIT_LONGEST, VIT_SIZE
from ..vit.backbone import Backbone, Request
from ..vit.features import Features, SelfSimilarity


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One weighted loss between an output of the generator and its target.

    Attributes:
        weight: Factor of the loss in the objective's total, at least 0.

    Raises:
        SpliceError: A weight below 0, or one that is no number.
    """

    weight: float = 1.0

    name: ClassVar[str]
    output: ClassVar[str]
    target: ClassVar[str]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise SpliceError(f"the weight of the {self.name} term must be at least 0, not {self.weight:g}")


@dataclass(frozen=True, kw_only=True)
class FeatureTerm(Term):
    """A loss between features of one block of a ViT, those of an output and those of its target.

    Attributes:
        layer: Index of the block, 0 the first, -1 the last.
        backbone: The ViT of this term; None takes the objective's own.
        fixed: What to compare with in place of the target picture, of the same ViT and block: `Features` for the
            appearance term, a `SelfSimilarity` of keys for the structure term.
    """

    layer: int = -1
    backbone: Backbone | None = None
    fixed: Features | SelfSimilarity | None = None

    facet: ClassVar[str]
    spatial: ClassVar[bool]
    """Whether the descriptor belongs to places in the picture, so that a fixed target fits the whole picture alone."""
    fixed_kind: ClassVar[type[Features] | type[SelfSimilarity] | None] = None
    """What a fixed target is; None where the term takes none."""

    @property
    def request(self) -> Request:
        """What is read from the ViT for this term."""
        return Request(self.layer, self.facet)

    def descriptor(self, features: Tensor, backbone: Backbone) -> Tensor:
        """What is compared, of a tensor of this term's facet."""
        return features

    def distance(self, output: Tensor, target: Tensor, backbone: Backbone) -> Tensor:
        """The unweighted loss, a scalar, between two tensors of this term's facet."""
        with torch.no_grad():
            target_descriptor = self.descriptor(target, backbone)
        return F.mse_loss(self.descriptor(output, backbone), target_descriptor)

    def check_fixed(self, backbone: Backbone) -> None:
        """Checks that the fixed target was made as this term's descriptors are.

        Raises:
            SpliceError: It is of another ViT, block or facet, of several pictures, or this term takes none.
        """
        if self.fixed is None:
            return
        if self.fixed_kind is None:
            raise SpliceError(f"the {self.name} term compares random crops of the appearance: it takes no fixed target")
        if not isinstance(self.fixed, self.fixed_kind):
            raise SpliceError(f"a fixed target of the {self.name} term is of the class {self.fixed_kind.__name__}")
        for what, needed in (
            ("backbone", backbone.name),
            ("layer", backbone.resolve(self.layer)),
            ("facet", self.facet if isinstance(self.fixed, SelfSimilarity) else self.fixed.facet),
        ):
            given = getattr(self.fixed, what)
            if given != needed:
                raise SpliceError(
                    f"the fixed target of the {self.name} term is of {what} {given}, but the term compares {needed}: "
                    "make both the same"
                )
        count = len(self.fixed_descriptor())
        if count > 1:
            raise SpliceError(f"the fixed target of the {self.name} term is of {count} pictures: blend or pick one")

    def fixed_descriptor(self, tokens: Tensor | None = None) -> Tensor:
        """The descriptor of the fixed target, of those patches alone where `tokens` `[N]` is given."""
        if isinstance(self.fixed, Features):
            return self.fixed.cls
        assert self.fixed is not None
        if tokens is None:
            return self.fixed.matrix
        taken = torch.cat([tokens.new_ones(1), tokens]).to(self.fixed.matrix.device)
        return self.fixed.matrix[:, taken][:, :, taken]

    def distance_to_fixed(self, output: Tensor, backbone: Backbone, tokens: Tensor | None = None) -> Tensor:
        """The unweighted loss, a scalar, between a tensor of this term's facet and the fixed target.

        Args:
            output: Of the output, or of its patches in `tokens` alone.
            backbone: The ViT.
            tokens: `[N]` booleans, the patches that take part; None for all.
        """
        return F.mse_loss(self.descriptor(output, backbone), self.fixed_descriptor(tokens).to(output))

    def loss(self, backbone: Backbone, output: Tensor, target: Tensor, size: int | None = VIT_SIZE) -> Tensor:
        """The unweighted loss, a scalar, between two pictures; differentiable in `output`.

        Args:
            backbone: The ViT, unless the term has its own.
            output: `[B, 3, H, W]` in 0..1.
            target: Likewise.
            size: Short side in pixels of what the ViT gets; None leaves the pictures as they are, to the nearest patch.
        """
        backbone = self.backbone or backbone
        features = backbone(resize(output, vit_input_size(backbone, output, size)), [self.request])
        with torch.no_grad():
            targets = backbone(resize(target, vit_input_size(backbone, target, size)), [self.request])
        return self.distance(features[self.request], targets[self.request], backbone)


@dataclass(frozen=True, kw_only=True)
class PictureTerm(Term):
    """A loss between the pixels of two pictures of one size."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The unweighted loss, a scalar, between two pictures `[B, 3, H, W]`, weighted by a mask `[1, 1, H, W]`."""


def vit_input_size(
    backbone: Backbone, picture: Tensor, size: int | None, longest: int | None = VIT_LONGEST
) -> tuple[int, int]:
    """The (height, width) at which a ViT gets a picture; `size` None keeps its own, to the nearest patch."""
    return backbone.grid_size(*sides(picture), short=size, longest=None if size is None else longest)
