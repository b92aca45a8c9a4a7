"""How far a result is from its two sources, in the measures of the literature."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, Request
from .images import resize, sides
from .objective import VIT_LONGEST, VIT_SIZE, Appearance, Structure


@dataclass(frozen=True)
class Measurement:
    """Distances of an output; comparable only between equal backbones, layers and sizes.

    Attributes:
        structure_distance: MSE of the keys' self-similarities of output and structure picture; 0 is the same.
        appearance_distance: MSE of the [CLS] tokens of output and appearance picture; 0 is the same.
        appearance_cosine: Their cosine; 1 is the same.
        backbone: Name of the ViT.
        layer: Its block, 0 the first.
        size: Short side in pixels at which it looked.
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
    """Measures a transfer.

    Args:
        structure: `[1, 3, H, W]` in 0..1.
        appearance: Likewise, of any size.
        output: Likewise; it is compared with `structure` at that one's aspect.
        backbone: The ViT that judges.
        layer: Index of its block.
        size: Short side in pixels at which it looks.
    """
    keys, cls = Request(layer, "key"), Request(layer, "cls")

    def see(picture: Tensor, like: Tensor, requests: list[Request]) -> dict[Request, Tensor]:
        grid = backbone.grid_size(*sides(like), short=size, longest=max(size, VIT_LONGEST))
        answer: dict[Request, Tensor] = backbone(resize(picture.to(backbone.device), grid), requests)
        return answer

    source, look = see(structure, structure, [keys]), see(appearance, appearance, [cls])
    result = see(output, structure, [keys, cls])
    return Measurement(
        structure_distance=Structure().distance(result[keys], source[keys], backbone).item(),
        appearance_distance=Appearance().distance(result[cls], look[cls], backbone).item(),
        appearance_cosine=F.cosine_similarity(result[cls], look[cls]).item(),
        backbone=backbone.name,
        layer=backbone.resolve(layer),
        size=size,
        dtype=str(backbone.dtype).removeprefix("torch."),
    )
