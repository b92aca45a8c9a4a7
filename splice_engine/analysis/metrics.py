"""Distances of a result from its structure and appearance pictures, in the measures of the literature."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, sides
from ..settings import VIT_LONGEST, VIT_SIZE
from ..training.losses import Appearance, Structure
from ..vit.backbone import Backbone, Request


@dataclass(frozen=True)
class Measurement:
    """Distances of an output; comparable only between equal backbones, layers, sizes and precisions.

    Attributes:
        structure_distance: MSE of the keys' self-similarities of output and structure picture; 0 if equal.
        appearance_distance: MSE of the [CLS] tokens of output and appearance picture; 0 if equal.
        appearance_cosine: Cosine similarity of those tokens; 1 if equal.
        backbone: Name of the ViT.
        layer: Its block, 0 the first.
        size: Short side in pixels of what it got.
        dtype: Precision of its matrix products.
    """

    structure_distance: float
    appearance_distance: float
    appearance_cosine: float
    backbone: str
    layer: int
    size: int
    dtype: str


@torch.no_grad()
def measure(
    structure: Tensor, appearance: Tensor, output: Tensor, backbone: Backbone, layer: int = -1, size: int = VIT_SIZE
) -> Measurement:
    """Computes the distances of a transfer's output from both of its pictures (paper, equations 4 and 5).

    Args:
        structure: `[1, 3, H, W]` in 0..1.
        appearance: Likewise, of any size.
        output: Likewise; it is resized to the aspect of `structure`.
        backbone: The ViT whose features are compared.
        layer: Index of its block, 0 the first, -1 the last.
        size: Short side in pixels of what it gets.

    Raises:
        SpliceError: Unknown layer.
    """
    keys, cls = Request(layer, "key"), Request(layer, "cls")

    def extract(picture: Tensor, like: Tensor, requests: list[Request]) -> dict[Request, Tensor]:
        at = backbone.grid_size(*sides(like), short=size, longest=max(size, VIT_LONGEST))
        extracted: dict[Request, Tensor] = backbone(resize(picture.to(backbone.device), at), requests)
        return extracted

    of_structure, of_appearance = extract(structure, structure, [keys]), extract(appearance, appearance, [cls])
    of_output = extract(output, structure, [keys, cls])
    return Measurement(
        structure_distance=Structure().distance(of_output[keys], of_structure[keys], backbone).item(),
        appearance_distance=Appearance().distance(of_output[cls], of_appearance[cls], backbone).item(),
        appearance_cosine=F.cosine_similarity(of_output[cls], of_appearance[cls]).item(),
        backbone=backbone.name,
        layer=backbone.resolve(layer),
        size=size,
        dtype=str(backbone.dtype).removeprefix("torch."),
    )
