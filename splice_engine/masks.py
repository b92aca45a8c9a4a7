"""What a mask selects: patches for the ViT, and pixels of the result.

An engine mask is a `[1, 1, H, W]` float32 tensor in 0..1, with 1 selected, that is stretched over its picture.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import resize, sides

FEATHER = 8.0
"""Pixels over which a change fades out beyond the edge of its mask."""


def covered(mask: Tensor) -> Tensor:
    """Where a mask selects at least half, as booleans; where it selects less than that everywhere, its highest places.

    So a mask always covers something, however soft it is and however small it has become.
    """
    return mask >= mask.amax().clamp(max=0.5)


def covered_patches(mask: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """The patches of a picture that its mask covers by area: `[h·w]` booleans, row by row over the grid.

    Args:
        mask: `[1, 1, H, W]` in 0..1.
        size: (height, width) in pixels at which the ViT sees the picture.
        patch: Side of a patch in pixels.
    """
    return covered(F.avg_pool2d(resize(mask, size), patch)).flatten()


def composite(picture: Tensor, painted: Tensor, mask: Tensor, feather: float) -> Tensor:
    """The painted picture where the mask is 1, the picture itself where it is 0, exactly; a blend in between.

    Args:
        picture: `[1, 3, H, W]`.
        painted: Likewise.
        mask: `[1, 1, h, w]` in 0..1.
        feather: Pixels of the picture over which the change fades out beyond the mask.
    """
    return torch.lerp(picture, painted, _feathered(resize(mask, sides(picture)), feather))


def _feathered(mask: Tensor, reach: float) -> Tensor:
    """A mask that falls to 0 at `reach` pixels beyond its edge, along a parabola, and nowhere below itself.

    A dilation with a paraboloid, as it is the only one that is both round and separable (van den Boomgaard, 1992).
    """
    for axis in (-2, -1):
        grown = mask.clone()
        length = mask.shape[axis]
        for step in range(1, min(math.ceil(reach), length)):
            fall = (step / reach) ** 2
            near, far = (mask.narrow(axis, start, length - step) - fall for start in (0, step))
            for start, shifted in ((step, near), (0, far)):
                target = grown.narrow(axis, start, length - step)
                torch.maximum(target, shifted, out=target)
        mask = grown
    return mask
