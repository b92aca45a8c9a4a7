"""From correspondence to patches: the guide of the patch search, and where the search begins."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, sides
from .correspondence import Correspondence
from .descriptors import principal_directions
from .filters import guided_filter, local_contrast
from .patchmatch import find_offsets

COHERENCE, EARLY_COHERENCE = 1, 2
"""Neighbours this many patches away vote on a match, in the last pass and before: what comes out whole first, such as
an ear, stays whole, and its outline is found in the end."""

PATCH_PIXELS = 16
"""Pixels per patch of the working size, whatever the ViT's own patch."""

FIELD_SCALE = 2
"""Pixels of the search per cell of the refined field of descriptors."""

SEARCH_SCALE = 2
"""Pixels of the working size per pixel of the search. What it finds copies whole patches of B, at any size; a search
for each pixel of the working size would tear them apart."""

CONTRAST_WEIGHT = 0.05
"""Weight of the local contrast beside the descriptors in the guide."""

BACKGROUND_USAGE = 4.0
"""Factor of the cost of usage in A's background: a meadow gets all that grows in B's. Within an object, the patch that
belongs there may be needed often."""

BACKGROUND_WEIGHT = 0.5
"""Weight of the background beside the descriptors: where its patches cost more and more, those of an object that is as
dark must not come to it."""

FIELD_DIMENSIONS = 24
"""Principal components of the descriptors of which the guide consists."""

FIELD_RADIUS, FIELD_VARIANCE = 6, 2e-4
"""Guided filter that fits the descriptors to the picture's edges: cells of the field, and the variance of an edge."""


def find_patches(
    match: Correspondence,
    a: Tensor,
    b: Tensor,
    cost: Tensor | None,
    backgrounds: Sequence[Tensor],
    is_last: bool,
) -> tuple[Tensor, tuple[int, int]]:
    """The patches of B and of its mirror image that paint A.

    Args:
        match: Which cells of A and B belong to which.
        a: A at the working size, `[1, 3, h, w]`.
        b: B, likewise, `[1, 3, h', w']`.
        cost: `[1, 1, h', w']`, further cost of each place of B; None is no cost.
        backgrounds: Of A and of B, `[1, 1, ·, ·]` in 0..1 for each of their cells: where they are background.
        is_last: No further pass follows.

    Returns:
        Offsets `[2, h/2, w/2]`, and the (height, width) of B in their pixels.
    """
    basis = principal_directions(torch.cat([match.source, match.target]), FIELD_DIMENSIONS)
    a, b = (
        resize(picture, (picture.shape[-2] // SEARCH_SCALE, picture.shape[-1] // SEARCH_SCALE)) for picture in (a, b)
    )
    guide, exemplar_guide = (
        _guide(picture, descriptors @ basis, background)
        for picture, descriptors, background in zip((a, b), (match.source, match.target), backgrounds, strict=True)
    )
    cells = (torch.arange(n, device=a.device) for n in match.source_grid)
    matches = match.matches(COHERENCE if is_last else EARLY_COHERENCE, mirror=True)
    start = matches - torch.stack(torch.meshgrid(*cells, indexing="ij"))
    offsets = find_offsets(
        _with_mirror_image(b),
        guide,
        _with_mirror_image(exemplar_guide),
        start * (PATCH_PIXELS // SEARCH_SCALE // match.density),
        None if cost is None else _with_mirror_image(resize(cost, sides(b))),
        mirrored=True,
        usage_factor=1 + (BACKGROUND_USAGE - 1) * resize(backgrounds[0], sides(a)),
    )
    return offsets, sides(b)


def _with_mirror_image(x: Tensor) -> Tensor:
    """`[B, C, H, W]` with its mirror image to the right: `[B, C, H, 2·W]`."""
    return torch.cat([x, x.flip(-1)], dim=-1)


def _guide(picture: Tensor, descriptors: Tensor, background: Tensor) -> Tensor:
    """What its cells show at every pixel of a picture, with its edges, and its contrast: `[1, C, H, W]`."""
    height, width = sides(picture)
    small = resize(picture, (height // FIELD_SCALE, width // FIELD_SCALE))
    cells = torch.cat([descriptors.T.reshape(1, -1, *sides(background)), BACKGROUND_WEIGHT * background], dim=1)
    wide = F.interpolate(cells, sides(small), mode="bilinear", align_corners=False)
    fine = guided_filter(small, wide, FIELD_RADIUS, FIELD_VARIANCE).apply(small)
    return torch.cat([resize(fine, (height, width)), CONTRAST_WEIGHT * local_contrast(picture)], dim=1)
