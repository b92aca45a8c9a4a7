"""A's own detail in the painted picture: folds, seams and eyes, as far as B's texture leaves them room."""

from torch import Tensor

from ..images import resize, sides
from .filters import box_mean, to_grey

CONTRAST_RADIUS, REGION_RADIUS = 8, 24
"""Pixels of the working size around a place over which texture and A's detail are compared, and those around it whose
contrast the picture gets from B."""

DETAIL_PRECEDENCE = 0.1
"""Mean square of A's detail, over that of the texture, at which both have an equal share."""

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


def lay_detail(
    colours: Tensor, texture: Tensor, grey: Tensor, base: Tensor, spots: Tensor, share: float, scale: float
) -> Tensor:
    """B's colours with its texture, and A's detail as far as the texture's contrast allows it.

    Args:
        colours: `[1, 3, H, W]`.
        texture: Likewise, around 0.
        grey: A's grey, `[1, 1, H, W]`.
        base: Its smooth part; what exceeds it is A's detail.
        spots: Where that detail is kept whatever the texture, of any size, see `find_spots`.
        share: Of the texture, 0..1.
        scale: Pixels per pixel of the working size.

    Returns:
        `[1, 3, H, W]`.
    """
    near, far = (round(radius * scale) for radius in (CONTRAST_RADIUS, REGION_RADIUS))
    # An eye that is half as bright as dark fur around it would hardly show in white fur at the same difference.
    growth = (to_grey(colours) + DARK) / (base.clamp_min(0) + DARK)
    detail = grey - base
    spots = SPOT_GAIN * resize(spots, sides(grey)) * (detail * growth).clamp_(max=0)
    detail = detail * growth.clamp_(1, DETAIL_GAIN)
    grey_of_texture = to_grey(texture)
    wanted = share * _energy(grey_of_texture, far) + (1 - share) * _energy(detail, far)
    detail = _limit_contrast(detail, wanted, far)
    # Seams of A stand out from its detail around them: there they push B's texture aside.
    own = _energy(detail, near)
    left = share * (1 - own / (own + DETAIL_PRECEDENCE * _energy(grey_of_texture, near) + FAINT))
    del grey_of_texture, growth, own  # each of a whole picture, which may be very large
    over = _limit_contrast((left * texture).add_(detail), wanted, far)
    return over.add_(colours).add_(spots).clamp_(0, 1)


def _limit_contrast(x: Tensor, wanted: Tensor, radius: int) -> Tensor:
    """`[1, C, H, W]` weakened in place where its grey has more than the wanted mean square `[1, 1, H, W]` around."""
    grey = x if x.shape[1] == 1 else to_grey(x)
    return x.mul_(((wanted + FAINT) / (_energy(grey, radius) + FAINT)).sqrt_().clamp_(max=1))


def _energy(x: Tensor, radius: int) -> Tensor:
    """The mean square of `[1, 1, H, W]` around each pixel."""
    return box_mean(x.square(), radius)
