"""Image filters: box mean, guided filter, local contrast, Laplacian pyramid, coarse chroma and pull-push filling."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, short_side_size, sides

GREY = (0.299, 0.587, 0.114)
"""Share of red, green and blue in a picture's grey (ITU-R BT.601)."""

LOCAL_CONTRAST_RADIUS = 12
"""Pixels around a place that count as its surroundings."""

CHROMA_SIDE, CHROMA_RADIUS = 256, 4
"""Short side in pixels at which coarse chroma is compared, and the pixels there over which it is averaged, twice."""


def to_grey(picture: Tensor) -> Tensor:
    """The luma of a picture: `[B, 3, H, W]` to `[B, 1, H, W]`."""
    weights = picture.new_tensor(GREY).view(1, 3, 1, 1)
    return (picture * weights).sum(dim=1, keepdim=True)


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean of `[B, C, H, W]` over the square around each pixel: a tenth of the time average pooling takes on CPUs."""
    x = F.pad(x, [radius] * 4, mode="replicate")
    return _window_mean(_window_mean(x, -1, 2 * radius + 1), -2, 2 * radius + 1)


def _window_mean(x: Tensor, dim: int, size: int) -> Tensor:
    """Means of `size` neighbours along one axis, from sums over windows of 1, 2, 4 … that `size` is the sum of."""
    left = x.shape[dim] - size + 1
    total = torch.zeros_like(x.narrow(dim, 0, left))
    sums, width, start = x, 1, 0
    while True:
        if size & width:
            total += sums.narrow(dim, start, left)
            start += width
        if start == size:
            return total / size
        sums = sums.narrow(dim, 0, sums.shape[dim] - width) + sums.narrow(dim, width, sums.shape[dim] - width)
        width *= 2


@dataclass(frozen=True)
class LocalFit:
    """A picture as a guide locally explains it: a linear function of the guide's channels, which changes from place to
    place so smoothly that it can be enlarged and applied to a larger guide (He and Sun, "Fast Guided Filter", 2015).

    Attributes:
        gain: `[G, C, H, W]`, of each channel of the guide for each of the picture.
        offset: `[1, C, H, W]`.
    """

    gain: Tensor
    offset: Tensor

    def apply(self, guide: Tensor) -> Tensor:
        """The picture `[1, C, h, w]` that a guide `[1, G, h, w]` of any size gives."""
        at = sides(guide)
        picture = resize(self.offset, at)
        for gain, channel in zip(self.gain.split(1), guide.split(1, dim=1), strict=True):
            picture = torch.addcmul(picture, resize(gain, at), channel)
        return picture


def guided_filter(guide: Tensor, picture: Tensor, radius: int, variance: float) -> LocalFit:
    """Fits a picture to a guide within a window around each pixel (He et al., "Guided Image Filtering", 2013).

    Args:
        guide: `[1, G, H, W]`: a grey picture, or one in colours, whose edges are then those in any of them.
        picture: `[1, C, H, W]`.
        radius: Of the window, in pixels.
        variance: Of the guide, above which its edges are kept.
    """
    mean = partial(box_mean, radius=radius)
    guide_mean, picture_mean = mean(guide), mean(picture)
    channels = guide.shape[1]
    # Each matrix has a row per channel of the guide.
    covariances = [mean(guide[:, row, None] * guide) - guide_mean[:, row, None] * guide_mean for row in range(channels)]
    shared = [mean(guide[:, row, None] * picture) - guide_mean[:, row, None] * picture_mean for row in range(channels)]
    ridge = variance * torch.eye(channels, device=guide.device)[..., None, None]
    gain = _solve(torch.cat(covariances) + ridge, torch.cat(shared))
    return LocalFit(mean(gain), mean(picture_mean - (gain * guide_mean.transpose(0, 1)).sum(dim=0, keepdim=True)))


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves `matrix` `[G, G, H, W]`, symmetric and positive definite at each pixel, for `right` `[G, C, H, W]`.

    By elimination, which needs no pivoting in such a matrix, and no operator that an accelerator may lack.
    """
    rows, solution = list(matrix), list(right)
    for pivot in range(len(rows)):
        scale = rows[pivot][pivot]
        rows[pivot], solution[pivot] = rows[pivot] / scale, solution[pivot] / scale
        for other in range(len(rows)):
            if other != pivot:
                factor = rows[other][pivot]
                rows[other] = rows[other] - factor * rows[pivot]
                solution[other] = solution[other] - factor * solution[pivot]
    return torch.stack(solution)


def local_contrast(picture: Tensor) -> Tensor:
    """Grey relative to the mean and deviation of its surroundings, within ±2: `[1, 3, H, W]` to `[1, 1, H, W]`."""
    grey = to_grey(picture)
    mean = box_mean(grey, LOCAL_CONTRAST_RADIUS)
    deviation = (box_mean((grey - mean) ** 2, LOCAL_CONTRAST_RADIUS)).sqrt()
    return ((grey - mean) / (deviation + 0.03)).clamp(-2, 2)


def laplacian_pyramid(picture: Tensor, levels: int = 4) -> Iterator[Tensor]:
    """The levels of a Laplacian pyramid of `[1, C, H, W]`, finest first, and what is left of the picture."""
    for _ in range(levels):
        height, width = sides(picture)
        small = resize(picture, (max(1, height // 2), max(1, width // 2)))
        yield picture - expand(small, (height, width))
        picture = small
    yield picture


def expand(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A level of a pyramid at the (height, width) of the next finer one."""
    return F.interpolate(picture, size, mode="bilinear", align_corners=False)


def with_coarse_chroma(picture: Tensor, reference: Tensor) -> Tensor:
    """The picture with another's colours at coarse scales, and its own brightness and detail.

    A [CLS] token that cannot tell colours apart lets training drift into casts over whole parts of a picture.

    Args:
        picture: `[1, 3, H, W]`; it is changed in place.
        reference: Likewise.
    """
    small = short_side_size(*sides(picture), min(CHROMA_SIDE, *sides(picture)))
    shift = resize(reference, small) - resize(picture, small)
    radius = round(CHROMA_RADIUS * min(small) / CHROMA_SIDE)
    shift = box_mean(box_mean(shift - to_grey(shift), radius), radius)
    return picture.add_(resize(shift, sides(picture)))


def pull_push_fill(picture: Tensor, weight: Tensor) -> Tensor:
    """The picture where its weight is 1; elsewhere the colours of the nearest places that have some weight.

    A pyramid of weighted means, read from its coarse end (pull-push: Gortler et al., "The Lumigraph", 1996).

    Args:
        picture: `[1, C, H, W]`.
        weight: `[1, 1, H, W]` in 0..1.
    """
    height, width = sides(weight)
    if height == width == 1:
        return picture
    share = F.avg_pool2d(weight, 2, ceil_mode=True)
    coarse = F.avg_pool2d(picture * weight, 2, ceil_mode=True) / share.clamp_min(1e-12)
    wide = resize(pull_push_fill(coarse, (4 * share).clamp(max=1)), (height, width))
    return torch.lerp(wide, picture, weight)
