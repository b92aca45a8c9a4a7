"""Which pixel of one frame is which of the next: optical flow without weights, and pictures warped along it."""

from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError, import_extra
from ..images import sides
from .filters import to_grey

LEAST_SIDE = 32
"""Pixels of the short side below which the flow has too few patches to begin with."""

SLACK, SLACK_SHARE = 0.5, 0.01
"""Square of the pixels by which both ways may miss each other, and its share of the squared lengths (Sundaram, Brox and
Keutzer, "Dense Point Trajectories by GPU-accelerated Large Displacement Optical Flow", 2010)."""


def import_opencv() -> ModuleType:
    """OpenCV, which is imported only where it is needed.

    Raises:
        SpliceError: It is not installed.
    """
    return import_extra("cv2", "opencv-python-headless", "optical flow needs")


@torch.no_grad()
def optical_flow(here: Tensor, there: Tensor) -> Tensor:
    """Where each pixel of a frame is in another frame, by dense inverse search (Kroeger et al., 2016) on the CPU.

    Args:
        here: `[1, 3, H, W]` in 0..1.
        there: Likewise.

    Returns:
        `[1, 2, H, W]`: what is at (x, y) here is at (x + flow[0, 0], y + flow[0, 1]) there.

    Raises:
        SpliceError: OpenCV is not installed, or the frames are too small.
    """
    cv2 = import_opencv()
    if min(sides(here)) < LEAST_SIDE:
        raise SpliceError(f"optical flow needs frames of at least {LEAST_SIDE} pixels a side: enlarge them")
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    found = search.calc(_to_bytes(here), _to_bytes(there), None)
    return torch.from_numpy(np.ascontiguousarray(found.transpose(2, 0, 1)))[None].to(here.device)


def warp(picture: Tensor, flow: Tensor) -> Tensor:
    """A picture of another frame as it is seen in this one.

    Args:
        picture: `[1, C, H, W]` of the other frame.
        flow: `[1, 2, H, W]` from this frame to the other, in pixels.

    Returns:
        `[1, C, H, W]`; places beyond the edge have the edge's values.
    """
    height, width = sides(flow)
    rows, columns = (torch.arange(side, device=flow.device) for side in (height, width))
    x, y = 2 * (columns + flow[:, 0]) / (width - 1) - 1, 2 * (rows[:, None] + flow[:, 1]) / (height - 1) - 1
    grid = torch.stack([x, y], dim=-1)
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=True)


def consistent(forth: Tensor, back: Tensor) -> Tensor:
    """Where the flow to a frame and the flow back from it lead to the same place, within that frame.

    What is hidden in one of the frames, or was not found, has no such place.

    Args:
        forth: `[1, 2, H, W]` from this frame to the other.
        back: Likewise, from the other to this one.

    Returns:
        `[1, 1, H, W]` booleans.
    """
    height, width = sides(forth)
    returned = warp(back, forth)
    squares = forth.square().sum(dim=1) + returned.square().sum(dim=1)
    meets = (forth + returned).square().sum(dim=1) <= SLACK_SHARE * squares + SLACK
    rows, columns = (torch.arange(side, device=forth.device) for side in (height, width))
    x, y = columns + forth[:, 0], rows[:, None] + forth[:, 1]
    return (meets & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))[:, None]


def nearest_places(valid: Tensor) -> Tensor:
    """For each place the nearest one that is valid.

    Args:
        valid: `[H, W]` booleans, at least one of them true.

    Returns:
        `[2, H, W]` integers: its row and column.
    """
    cv2 = import_opencv()
    known = valid.cpu().numpy()
    _, labels = cv2.distanceTransformWithLabels(
        (~known).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    place_of = np.zeros(labels.max() + 1, np.int64)
    place_of[labels[known]] = np.flatnonzero(known)
    places = torch.from_numpy(place_of[labels]).to(valid.device)
    return torch.stack([places // valid.shape[1], places % valid.shape[1]])


def _to_bytes(picture: Tensor) -> np.ndarray:
    return to_grey(picture)[0, 0].clamp(0, 1).mul(255).round().to("cpu", torch.uint8).contiguous().numpy()
