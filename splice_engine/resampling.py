"""Bilinear resizing, antialiased where it shrinks, on every device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lacks_antialiasing(device: torch.device) -> bool:
    """Whether a device has no kernel for antialiased resizing or for its gradient: Apple's, before torch of 2026."""
    return device.type == "mps"


def resize_bilinear(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes `[B, C, H, W]` to `size` = (height, width); differentiable."""
    height, width = picture.shape[-2:]
    shrinks = size[0] < height or size[1] < width
    if shrinks and lacks_antialiasing(picture.device):
        rows, columns = (_triangle_weights(*axis).to(picture) for axis in ((height, size[0]), (width, size[1])))
        return rows @ picture @ columns.T
    return F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=shrinks)


def _triangle_weights(length: int, resized: int) -> Tensor:
    """`[resized, length]`: shares of the pixels of one axis in each resized pixel, as `F.interpolate` has them.

    The filter is a triangle as wide as two resized pixels, or as two pixels where the axis grows.
    """
    scale = length / resized
    centres = (torch.arange(resized) + 0.5) * scale
    weights = 1 - (torch.arange(length) + 0.5 - centres[:, None]).abs() / max(scale, 1.0)
    weights = weights.clamp_min(0)
    return weights / weights.sum(dim=1, keepdim=True)
