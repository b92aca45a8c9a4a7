"""The losses: what the output must share with the structure picture and with the appearance picture."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import sides
from ..settings import Settings
from ..vit.backbone import Backbone
from ..vit.features import Features, SelfSimilarity, cosine_similarity_matrix
from .distances import relaxed_transport
from .terms import FeatureTerm, PictureTerm, Term


@dataclass(frozen=True, kw_only=True)
class Appearance(FeatureTerm):
    """Mean squared difference of the [CLS] tokens of G(a) and b (paper, equation 4)."""

    weight: float = 10.0
    name: ClassVar[str] = "appearance"
    facet: ClassVar[str] = "cls"
    fixed_kind: ClassVar[type[Features] | type[SelfSimilarity] | None] = Features
    spatial: ClassVar[bool] = False
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "appearance"


@dataclass(frozen=True, kw_only=True)
class Structure(FeatureTerm):
    """Mean squared difference of the keys' self-similarities of G(a) and a (paper, equation 5)."""

    name: ClassVar[str] = "structure"
    facet: ClassVar[str] = "key"
    fixed_kind: ClassVar[type[Features] | type[SelfSimilarity] | None] = SelfSimilarity
    spatial: ClassVar[bool] = True
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "structure"

    def descriptor(self, features: Tensor, backbone: Backbone) -> Tensor:
        if backbone.prefix > 1:  # registers belong to no place in the picture
            features = torch.cat([features[:, :1], features[:, backbone.prefix :]], dim=1)
        return cosine_similarity_matrix(features)


@dataclass(frozen=True, kw_only=True)
class Identity(FeatureTerm):
    """Mean squared difference of the keys of G(b) and b (paper, equation 6)."""

    name: ClassVar[str] = "identity"
    facet: ClassVar[str] = "key"
    spatial: ClassVar[bool] = True
    output: ClassVar[str] = "reconstruction"
    target: ClassVar[str] = "appearance"


@dataclass(frozen=True, kw_only=True)
class TokenDistance(FeatureTerm):
    """Relaxed earth mover's distance between the tokens of G(a) and of b (Kolkin et al., 2019).

    Unlike the [CLS] token it holds each part of the output to some part of b, and all of b to some part of the output:
    texture in middle blocks, meaning in the last. Cosines are those of tokens less the mean of b's.
    """

    layer: int = -7
    name: ClassVar[str] = "token_distance"
    facet: ClassVar[str] = "token"
    spatial: ClassVar[bool] = False
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "appearance"

    def distance(self, output: Tensor, target: Tensor, backbone: Backbone) -> Tensor:
        wanted = target[:, backbone.prefix :].detach().flatten(0, 1)
        mean = wanted.mean(dim=0)
        wanted = F.normalize(wanted - mean, dim=-1)
        tokens = F.normalize(output[:, backbone.prefix :] - mean, dim=-1)
        return torch.stack([relaxed_transport(1 - own @ wanted.T) for own in tokens]).mean()


@dataclass(frozen=True, kw_only=True)
class Colour(PictureTerm):
    """Mean squared difference of the low-pass colours of G(a) and of the matched image.

    It holds the output's colours where they belong while the [CLS] token, which knows no place, moves them.

    Attributes:
        cell: Side of the squares of pixels whose means are compared.
    """

    cell: int = 16
    name: ClassVar[str] = "colour"
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "matched"

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        difference, share = _cell_means(output - target, self.cell, mask)
        return _mean(difference.square(), share)


@dataclass(frozen=True, kw_only=True)
class Contrast(PictureTerm):
    """Mean squared difference of the local contrasts, standard deviations in squares, of G(a) and of the matched image.

    It keeps texture at its strength, which losses between pixels fade wherever they cannot place it.

    Attributes:
        cell: Side of the squares in pixels.
    """

    cell: int = 16
    name: ClassVar[str] = "contrast"
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "matched"

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
class MatchedL1(PictureTerm):
    """Mean absolute difference of G(a) and the matched image."""

    name: ClassVar[str] = "matched_l1"
    output: ClassVar[str] = "output"
    target: ClassVar[str] = "matched"

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mean((output - target).abs(), mask)


def recipe_terms(settings: Settings) -> list[Term]:
    """The losses of a recipe: those with a weight above 0."""
    terms: tuple[Term, ...] = (
        Appearance(weight=settings.appearance_weight, layer=settings.layer),
        Structure(weight=settings.structure_weight, layer=settings.layer),
        Identity(weight=settings.identity_weight, layer=settings.layer),
        Colour(weight=settings.colour_weight),
        Contrast(weight=settings.contrast_weight),
        MatchedL1(weight=settings.matched_l1_weight),
        Reconstruction(weight=settings.reconstruction_weight),
    )
    return [term for term in terms if term.weight > 0]


def _cell_means(values: Tensor, cell: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means of `[B, C, H, W]` over squares of pixels, and the share of each that is picture and, if given, mask.

    The last squares may stick out of the picture; their means are of what is inside.
    """
    if mask is None:
        mask = values.new_ones(1, 1, *sides(values))
    share, sums = (F.avg_pool2d(x, cell, ceil_mode=True, divisor_override=cell * cell) for x in (mask, values * mask))
    return sums / share.clamp_min(1e-6), share


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of `[B, C, H, W]`, weighted by `[1, 1, H, W]` where that is given."""
    return values.mean() if weights is None else (values * weights).sum() / weights.expand_as(values).sum()
