"""A sum of weighted losses, evaluated in as few passes through the ViTs as the pictures' sizes allow."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpliceError
from ..images import resize
from ..masks import covered_patches
from ..settings import VIT_LONGEST, VIT_SIZE
from ..vit.backbone import Backbone, Request
from .terms import FeatureTerm, PictureTerm, Term, vit_input_size

MASKS = {
    "output": "structure_mask",
    "structure": "structure_mask",
    "matched": "structure_mask",
    "reconstruction": "appearance_mask",
    "appearance": "appearance_mask",
}
"""The mask that belongs to each of the pictures."""


@dataclass(frozen=True)
class Pictures:
    """What a step compares; a picture that takes no part is None, and so are the losses that need it.

    Attributes:
        output: `[B, 3, H, W]` in 0..1, G(a).
        structure: a, likewise.
        matched: The matched image at the same crop as a.
        appearance: b, of any size.
        reconstruction: G(b).
        structure_mask: `[1, 1, H, W]` in 0..1, of a, G(a) and the matched image. The ViT gets only the patches that a
            mask covers at least half; terms between pixels weigh them by it.
        appearance_mask: Likewise of b and G(b).
    """

    output: Tensor | None = None
    structure: Tensor | None = None
    matched: Tensor | None = None
    appearance: Tensor | None = None
    reconstruction: Tensor | None = None
    structure_mask: Tensor | None = None
    appearance_mask: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        """A picture that takes part, by its name."""
        picture: Tensor | None = getattr(self, name)
        if picture is None:
            raise KeyError(name)
        return picture

    def __contains__(self, name: str) -> bool:
        return getattr(self, name) is not None

    def mask_of(self, name: str) -> Tensor | None:
        """The mask of a picture."""
        mask: Tensor | None = getattr(self, MASKS[name])
        return mask


Targets = dict[tuple[str, FeatureTerm], Tensor]
"""ViT features that outputs are compared with, by the picture's name and the term that compares them."""


class Objective:
    """A sum of weighted terms, evaluated with as few passes through the ViTs as the pictures' sizes allow.

    Args:
        terms: The losses. Two of one kind are told apart as "structure", "structure_2", …
        backbone: The ViT of all terms that name none.
        size: Short side in pixels of what a ViT gets.
        longest: Most pixels of the long side.
        recompute: Compute a ViT's blocks once more in the backward pass instead of keeping what they computed.

    Raises:
        SpliceError: No terms, a term that reads a block which its ViT does not have, or one with a fixed target that
            was made in another way.
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
                self._backbone_for(term).resolve(term.layer)
                term.check_fixed(self._backbone_for(term))
        if not self.terms:
            raise SpliceError("the objective has no term: give at least one of the weights a value above 0")

    @property
    def needs_matched(self) -> bool:
        """Whether a term compares with the matched image."""
        return any(term.target == "matched" for term in self.terms.values())

    @property
    def needs_whole_pictures(self) -> bool:
        """Whether a term has a fixed target that belongs to places, so that it fits no crop."""
        return any(term.spatial and term.fixed is not None for term in self._feature_terms(None).values())

    def check_grids(self, picture: Tensor) -> None:
        """Checks that fixed targets that belong to places fit a whole picture `[1, 3, H, W]` at the size of training.

        Raises:
            SpliceError: One has another grid of patches.
        """
        for name, term in self._feature_terms(None).items():
            if term.spatial and term.fixed is not None:
                backbone = self._backbone_for(term)
                height, width = vit_input_size(backbone, picture, self.size, self.longest)
                grid = (height // backbone.patch, width // backbone.patch)
                if term.fixed.grid != grid:
                    raise SpliceError(
                        f"the fixed target of the {name} term has {term.fixed.grid[1]}x{term.fixed.grid[0]} patches, "
                        f"but the output has {grid[1]}x{grid[0]}: take it from a picture of the structure picture's "
                        f"shape, at the size {self.size}"
                    )

    def targets(self, pictures: Pictures, names: Sequence[str] | None = None) -> Targets:
        """Features of the pictures that outputs are compared with; arguments as for `losses`.

        Samples that are used again need them once: they go into `losses` and save it a pass.
        """
        wanted = [
            (term.target, term)
            for term in self._feature_terms(names).values()
            if term.fixed is None and term.target in pictures
        ]
        with torch.no_grad():
            return self._extract(pictures, wanted)

    def losses(
        self, pictures: Pictures, names: Sequence[str] | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses of the terms whose pictures all take part.

        Args:
            pictures: What is compared, and the masks.
            names: Only these terms.
            targets: What `targets` gave for these pictures; None extracts them now.
        """
        terms = {
            name: term
            for name, term in self.terms.items()
            if term.output in pictures and term.target in pictures and (names is None or name in names)
        }
        feature_terms = {name: term for name, term in self._feature_terms(names).items() if name in terms}
        outputs = self._extract(pictures, [(term.output, term) for term in feature_terms.values()])
        if targets is None:
            targets = self.targets(pictures, list(feature_terms))
        losses = {}
        for name, term in terms.items():
            if isinstance(term, FeatureTerm):
                features, backbone = outputs[term.output, term], self._backbone_for(term)
                if term.fixed is None:
                    losses[name] = term.distance(features, targets[term.target, term], backbone)
                else:
                    losses[name] = term.distance_to_fixed(features, backbone, self._tokens(pictures, term))
            elif isinstance(term, PictureTerm):
                mask = pictures.mask_of(term.output)
                losses[name] = term.loss(pictures[term.output], pictures[term.target], mask)
        return losses

    def total(self, losses: Mapping[str, Tensor], weight_scale: Mapping[str, float] | None = None) -> Tensor:
        """The weighted sum of losses by their terms' names; `weight_scale` holds further factors for some of them."""
        scale = weight_scale or {}
        return torch.stack(
            [self.terms[name].weight * scale.get(name, 1.0) * loss for name, loss in losses.items()]
        ).sum()

    def _feature_terms(self, names: Sequence[str] | None) -> dict[str, FeatureTerm]:
        """The terms that compare ViT features, of those with the given names."""
        return {
            name: term
            for name, term in self.terms.items()
            if isinstance(term, FeatureTerm) and (names is None or name in names)
        }

    def _tokens(self, pictures: Pictures, term: FeatureTerm) -> Tensor | None:
        """The patches of a term's output that its mask covers, `[N]`; None without a mask."""
        mask, backbone = pictures.mask_of(term.output), self._backbone_for(term)
        if mask is None:
            return None
        size = vit_input_size(backbone, pictures[term.output], self.size, self.longest)
        return covered_patches(mask, size, backbone.patch)

    def _backbone_for(self, term: FeatureTerm) -> Backbone:
        return term.backbone or self.backbone

    def _extract(self, pictures: Pictures, wanted: list[tuple[str, FeatureTerm]]) -> Targets:
        """What each term reads of its picture. Pictures that one ViT gets at one size and mask share a pass."""
        passes: dict[tuple[Backbone, tuple[int, int], str | None], dict[str, set[Request]]] = {}
        for picture, term in wanted:
            backbone = self._backbone_for(term)
            size = vit_input_size(backbone, pictures[picture], self.size, self.longest)
            key = (backbone, size, None if pictures.mask_of(picture) is None else MASKS[picture])
            passes.setdefault(key, {}).setdefault(picture, set()).add(term.request)
        features: dict[tuple[str, Backbone, Request], Tensor] = {}
        for (backbone, size, _), requests in passes.items():
            parts = [resize(pictures[picture], size) for picture in requests]
            mask = pictures.mask_of(next(iter(requests)))
            tokens = None if mask is None else covered_patches(mask, size, backbone.patch)
            answer = backbone(torch.cat(parts), set().union(*requests.values()), tokens, self.recompute)
            for request, tensor in answer.items():
                split = tensor.split([len(part) for part in parts])
                features.update(
                    {(picture, backbone, request): piece for picture, piece in zip(requests, split, strict=True)}
                )
        return {(picture, term): features[picture, self._backbone_for(term), term.request] for picture, term in wanted}
