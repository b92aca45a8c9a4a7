"""A's own detail in the painted picture: outlines, folds and eyes, which B's texture must not bury; and what is left of
that texture where its patches meet."""

import torch
from torch import Tensor

from ..images import resize, sides
from .filters import box_mean, to_grey

CONTRAST_RADIUS, REGION_RADIUS = 4, 24
"""Pixels of the working size around a place over which texture and A's detail are compared, and those around it whose
contrast the picture gets from B."""

EVEN_WITHIN, EVEN_IN_BACKGROUND, EVEN_AT_OUTLINES = 0.25, 3.0, 0.15
"""Mean square of A's detail, over that of the texture as it is laid, at which half of the texture gives way: within the
parts of A, in its background, whose grass and waves are B's rather, and at outlines, which B's patches would fray."""

SEAM_RADIUS, SEAM_FAINT = 8, 1e-4
"""Pixels of the working size over which the contrast of what is painted is compared with B's own, and the variance that
is not told from none."""

OWN_CONTRAST = 3
"""Power of what is missing of the texture that is the share of A in the picture's contrast: all of it without texture,
little from half of it on."""

FAINT = 4e-4
"""Variance that is not told from none: a contrast of 0.02."""

DETAIL_GAIN, DARK = 2.0, 0.05
"""Most by which A's detail grows, in proportion to the brightness, where the picture becomes brighter than A; and what
is added to the brightness of both, since in the darkest places A's detail is noise."""

SPOT_BLUR, SPOT_RADIUS, SPOT_SURROUNDINGS = 3, 6, 40
"""Pixels of the working size: over which noise is averaged before spots are sought, of a spot, and around it."""

SPOT_FAINT = 1e-4
"""Mean square of a contrast, as a share of the brightness, that is not told from none."""

SPOT_CONTRAST = 3.0
"""Mean square of a spot, over that of the detail around it, from which it counts as one; from twice as much on, fully.
At half of it folds and the tips of fur count too."""

SPOT_GAIN = 2.0
"""By which spots are darker than in A: part of them is in the smooth brightness around them, too."""


def find_spots(grey: Tensor, base: Tensor) -> Tensor:
    """Small dark places that stand out from all detail around them: eyes, nostrils, letters.

    Args:
        grey: A's grey at the working size, `[1, 1, h, w]`.
        base: Its smooth part.

    Returns:
        Their degree, `[1, 1, h, w]` in 0..1.
    """
    contrast = (grey - base) / (base.clamp_min(0) + DARK)
    contrast = box_mean(box_mean(contrast, SPOT_BLUR), SPOT_BLUR)
    own = _energy(contrast.clamp(max=0), SPOT_RADIUS)
    around = box_mean(_energy(contrast, SPOT_RADIUS), SPOT_SURROUNDINGS)
    return box_mean((own / (around + SPOT_FAINT) / SPOT_CONTRAST - 1).clamp(0, 1), SPOT_RADIUS)


def variance_around(picture: Tensor) -> Tensor:
    """The variance of the grey of `[1, 3, h, w]` around each place of the working size, `[1, 1, h, w]`."""
    grey = to_grey(picture)
    return _energy(grey - box_mean(grey, SEAM_RADIUS), SEAM_RADIUS)


def seam_gain(painted: Tensor, own: Tensor) -> Tensor:
    """What is left of B's texture where patches meet that do not continue each other.

    In a backdrop that is out of focus nothing tells places apart, and the seams of its patches would be grain that B
    does not have.

    Args:
        painted: A painted with B's patches at the working size, `[1, 3, h, w]`.
        own: `[1, 1, ·, ·]`, of any size: B's variance, see `variance_around`, where each place's patch comes from.

    Returns:
        `[1, 1, h, w]` in 0..1.
    """
    own = box_mean(resize(own, sides(painted)), SEAM_RADIUS // 2)
    return _limiting_gain(variance_around(painted), own, SEAM_FAINT)


def texture_share(share: float, background: Tensor) -> Tensor:
    """The share of B's texture `[1, 1, H, W]`: it is larger where A is background, `[1, 1, H, W]` in 0..1."""
    return 1 - (1 - share) ** (1 + background)


def detail_share(grey: Tensor, base: Tensor, texture: Tensor, regions: Tensor, share: float, scale: float) -> Tensor:
    """How far B's texture gives way to A's detail: where that has half of its contrast, and at outlines with less.

    Args:
        grey: A's grey, `[1, 1, H, W]`.
        base: Its smooth part.
        texture: B's, grey, likewise.
        regions: `[1, 2, h, w]` in 0..1, of any size: outlines, see `descriptors.find_outlines`, and the background.
        share: Of the texture in the foreground, 0..1.
        scale: Pixels per pixel of the working size.

    Returns:
        `[1, 1, H, W]` in 0..1.
    """
    radius = round(CONTRAST_RADIUS * scale)
    outlines, background = resize(regions, sides(grey)).split(1, dim=1)
    # The smooth part holds the edge of an outline itself.
    own = torch.lerp(_energy(grey - base, radius), _energy(grey - box_mean(grey, radius), radius), outlines).square_()
    even = EVEN_WITHIN + (EVEN_IN_BACKGROUND - EVEN_WITHIN) * background
    even = torch.lerp(even, even.new_tensor(EVEN_AT_OUTLINES), outlines)
    laid = texture_share(share, background).square_().mul_(_energy(texture, radius))
    even = even.mul_(laid).add_(FAINT).square_()
    return own.div_(even.add_(own))


def lay_detail(
    colours: Tensor,
    texture: Tensor,
    grey: Tensor,
    base: Tensor,
    spots: Tensor,
    regions: Tensor,
    share: float,
    scale: float,
) -> Tensor:
    """B's colours with its texture, which gives way to A's detail, and that detail at B's contrast.

    Args:
        colours: `[1, 3, H, W]`.
        texture: Likewise, around 0.
        grey: A's grey, `[1, 1, H, W]`.
        base: Its smooth part; what exceeds it is A's detail.
        spots: Where that detail is kept whatever the texture, of any size, see `find_spots`.
        regions: As for `detail_share`.
        share: Likewise.
        scale: Pixels per pixel of the working size.

    Returns:
        `[1, 3, H, W]`.
    """
    region = round(REGION_RADIUS * scale)
    # An eye that is half as bright as dark fur around it would hardly show in white fur at the same difference.
    growth = (to_grey(colours) + DARK) / (base.clamp_min(0) + DARK)
    detail = grey - base
    spots = SPOT_GAIN * resize(spots, sides(grey)) * (detail * growth).clamp_(max=0)
    grey_of_texture = to_grey(texture)
    regions = resize(regions, sides(grey))
    outlines, background = regions.split(1, dim=1)
    laid = texture_share(share, background)
    left = detail_share(grey, base, grey_of_texture, regions, share, scale).neg_().add_(1).mul_(laid)
    detail = detail.mul_(growth.clamp_(1, DETAIL_GAIN))
    detail.mul_(1 - left * background * (1 - outlines))  # A's grass would bury the flowers of B's
    wanted = torch.lerp(_energy(grey_of_texture, region), _energy(detail, region), (1 - laid) ** OWN_CONTRAST)
    detail = _limit_contrast(detail, wanted, region)
    del grey_of_texture, growth, laid, regions, outlines, background  # each of a whole picture, which may be very large
    over = _limit_contrast((left * texture).add_(detail), wanted, region)
    return over.add_(colours).add_(spots).clamp_(0, 1)


def _limit_contrast(x: Tensor, wanted: Tensor, radius: int) -> Tensor:
    """`[1, C, H, W]` weakened in place where its grey has more than the wanted mean square `[1, 1, H, W]` around."""
    grey = x if x.shape[1] == 1 else to_grey(x)
    return x.mul_(_limiting_gain(_energy(grey, radius), wanted, FAINT))


def _limiting_gain(square: Tensor, wanted: Tensor, faint: float) -> Tensor:
    """By what a mean square is brought down to the wanted one, in 0..1; both are told from none from `faint` on."""
    return ((wanted + faint) / (square + faint)).sqrt_().clamp_(max=1)


def _energy(x: Tensor, radius: int) -> Tensor:
    """The mean square of `[1, 1, H, W]` around each pixel."""
    return box_mean(x.square(), radius)
