"""How steady a clip is: its change along the motion of the clip that it was made from."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpliceError
from ..images import resize, sides
from ..matching.flow import consistent, optical_flow, warp


@dataclass(frozen=True)
class Flicker:
    """Changes from frame to frame, of values in 0..1; means over all pairs of neighbouring frames.

    Attributes:
        warping_error: Mean squared difference between the result's frame and the frame before it, warped along the flow
            of the source, where that is consistent both ways (Lai et al., "Learning Blind Video Temporal Consistency",
            2018). 0 moves just as the source does.
        source_warping_error: The same of the source itself: what noise, light and the flow's own errors leave.
        flickering: 1 less the mean absolute difference of neighbouring frames (VBench's temporal flickering). Only of
            a source that stands still it tells flicker from motion.
        source_flickering: The same of the source; 1 stands still.
        consistent: Share of the pixels that were compared along the flow.
        frames: Number of frames.
    """

    warping_error: float
    source_warping_error: float
    flickering: float
    source_flickering: float
    consistent: float
    frames: int


@torch.no_grad()
def measure_flicker(frames: Iterable[tuple[Tensor, Tensor]]) -> Flicker:
    """Measures the flicker of a clip; no more than two of its frames are held at a time.

    Args:
        frames: Frames of the source and of the result, `[1, 3, H, W]` in 0..1, one after the other. A result of another
            size is resized to its source.

    Raises:
        SpliceError: Fewer than two frames, frames of several sizes, OpenCV is not installed, or the flow is nowhere
            consistent.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    before: tuple[Tensor, Tensor] | None = None
    shares, count = 0.0, 0
    for source, result in frames:
        source, result = source.cpu().float(), resize(result.cpu().float(), sides(source))
        count += 1
        if before is not None:
            if sides(before[0]) != sides(source):
                sizes = [f"{width}x{height}" for height, width in (sides(before[0]), sides(source))]
                raise SpliceError(f"frame {count} has {sizes[1]} pixels and the one before it {sizes[0]}: resize them")
            flow = optical_flow(source, before[0])
            mask = consistent(flow, optical_flow(before[0], source))
            pairs = ((result, before[1]), (source, before[0]))
            squares = [
                ((now - warp(then, flow)).square().mean(dim=1, keepdim=True) * mask).sum() for now, then in pairs
            ]
            changes = [(now - then).abs().mean() for now, then in pairs]
            covered = mask.sum().clamp(min=1)
            sums += torch.stack([*(square / covered for square in squares), *changes]).double()
            shares += mask.float().mean().item()
        before = (source, result)
    if count < 2:
        raise SpliceError(f"flicker is measured between frames, and there is {'one' if count else 'none'}: give a clip")
    if not shares:
        raise SpliceError("the source's motion can nowhere be followed from one frame to the next: give a clip")
    pairs_seen = count - 1
    error, source_error, change, source_change = (sums / pairs_seen).tolist()
    return Flicker(error, source_error, 1 - change, 1 - source_change, shares / pairs_seen, count)
