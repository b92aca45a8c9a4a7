"""Features on a grid finer than the patches, from shifted passes at the same scale.

The ViT gets the picture several times, shifted by fractions of a patch, and the grids are interleaved (Amir et al.,
"Deep ViT Features as Dense Visual Descriptors", 2021, make the patch embedding overlap instead). A larger input would
be finer too, but changes what a patch holds, and parts of objects are no longer recognised.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError
from ..images import resize, sides
from ..settings import DENSITIES
from .backbone import Backbone, Request
from .features import FACETS, Features


def dense_features(
    picture: Tensor,
    backbone: Backbone,
    layer: int = -1,
    facet: str = "token",
    size: int | None = None,
    density: int = 2,
) -> Features:
    """Features of a batch of pictures on a grid `density` times as fine as the patches.

    Args:
        picture: `[B, 3, H, W]` in 0..1.
        backbone: The ViT.
        layer: Index of the block, 0 the first, -1 the last.
        facet: "token", "key", "query" or "value".
        size: Short side in pixels to resize to; None keeps the picture's own size, to the nearest patch.
        density: 1, 2 or 4; the time grows with its square, the memory of a pass does not.

    Returns:
        Features whose grid is `density` times as fine; [CLS] and registers are those of the picture as it is.

    Raises:
        SpliceError: Unknown layer, facet or density.
    """
    picture = picture.to(backbone.device)
    plain = backbone.features(picture, layer, facet, size)
    if density == 1:
        return plain
    request = Request(layer, facet)
    height, width = plain.grid
    at = (height * backbone.patch, width * backbone.patch)
    tokens = extract_dense(resize(picture, at), backbone, [request], density)[request]
    return replace(plain, tokens=tokens.flatten(1, 2), grid=(height * density, width * density))


def extract_dense(
    picture: Tensor, backbone: Backbone, requests: Sequence[Request], density: int, every_second: bool = False
) -> dict[Request, Tensor]:
    """What is read of a batch of pictures, on a grid `density` times as fine as the patches.

    Args:
        picture: `[B, 3, H, W]` in 0..1, sides divisible by the patch size.
        backbone: The ViT.
        requests: Facets of tokens.
        density: 1, 2 or 4.
        every_second: Only the black squares of the fine grid, as of a checkerboard, are extracted, in half of the time;
            the white ones get the means of their neighbours. A mirrored picture's are the others.

    Returns:
        `[B, h·density, w·density, D]` for each request.

    Raises:
        SpliceError: Unknown layer, facet or density.
    """
    if density not in DENSITIES:
        raise SpliceError(f"density must be one of {', '.join(map(str, DENSITIES))}, not {density}")
    if unknown := {request.facet for request in requests} - set(FACETS):
        raise SpliceError(f"there is no grid of '{min(unknown)}': choose among {', '.join(FACETS)}")
    grid = (picture.shape[-2] // backbone.patch, picture.shape[-1] // backbone.patch)
    offsets = [math.floor((step - (density - 1) / 2) * backbone.patch / density + 0.5) for step in range(density)]
    dense: dict[Request, Tensor] = {}
    for row, down in enumerate(offsets):
        for column, right in enumerate(offsets):
            if every_second and (row + column) % 2:
                continue
            extracted = backbone(shift(picture, down, right), requests)
            for request, tokens in extracted.items():
                if request not in dense:
                    size = (len(picture), grid[0] * density, grid[1] * density, tokens.shape[-1])
                    dense[request] = tokens.new_empty(size)
                cells = tokens[:, backbone.prefix :].unflatten(1, grid)
                dense[request][:, row::density, column::density] = cells
    if every_second and density > 1:
        for features in dense.values():
            _fill_white_squares(features)
    return dense


def _fill_white_squares(features: Tensor) -> None:
    """Gives the cells of `[B, h, w, D]` whose row and column are not both even or both odd the means of their four
    neighbours, which are."""
    padded = F.pad(features.movedim(-1, 1), [1] * 4, mode="reflect").movedim(1, -1)
    vertical = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1]
    horizontal = padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    for row, column in ((0, 1), (1, 0)):
        white = (slice(None), slice(row, None, 2), slice(column, None, 2))
        features[white] = (vertical[white] + horizontal[white]) / 4


def shift(picture: Tensor, down: int, right: int) -> Tensor:
    """The picture from `down` and `right` pixels further on; what comes in is reflected at the border."""
    reach = max(abs(down), abs(right))
    if not reach:
        return picture
    height, width = sides(picture)
    wide = F.pad(picture, [reach] * 4, mode="reflect")
    return wide[..., reach + down : reach + down + height, reach + right : reach + right + width].contiguous()
