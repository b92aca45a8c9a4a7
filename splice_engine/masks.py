"""Masks: which patches the ViT gets, and where the result is composited into the picture.

An engine mask is a `[1, 1, H, W]` float32 tensor in 0..1, with 1 selected; it is resized to its picture.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import resize, sides

FEATHER = 8.0
"""Default width in pixels of the transition outside a mask."""


def covered(mask: Tensor) -> Tensor:
    """Booleans, true where a mask is at least 0.5, or equal to its maximum where that is smaller.

    So a mask always covers something, however soft it is and however far it was shrunk.
    """
    return mask >= mask.amax().clamp(max=0.5)


def covered_patches(mask: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """The patches of a picture whose area a mask covers, at least by half if there are such.

    Args:
        mask: `[1, 1, H, W]` in 0..1.
        size: (height, width) in pixels of what the ViT gets.
        patch: Side of a patch in pixels.

    Returns:
        `[h·w]` booleans, row by row over the grid.
    """
    return covered(F.avg_pool2d(resize(mask, size), patch)).flatten()


def composite(picture: Tensor, painted: Tensor, mask: Tensor, feather: float) -> Tensor:
    """Blends a painted picture into the original: where the mask and its feather are 0 that is kept exactly.

    Args:
        picture: `[1, 3, H, W]`.
        painted: Likewise.
        mask: `[1, 1, h, w]` in 0..1.
        feather: Width of the transition outside the mask, in pixels of the picture.

    Returns:
        `[1, 3, H, W]`.
    """
    return torch.lerp(picture, painted, _feather(resize(mask, sides(picture)), feather))


def _feather(mask: Tensor, reach: float) -> Tensor:
    """A mask that falls to 0 along a parabola within `reach` pixels outside its edge, and is nowhere below itself.

    This is a dilation with a paraboloid, the only kernel that is both round and separable (van den Boomgaard, 1992).
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
