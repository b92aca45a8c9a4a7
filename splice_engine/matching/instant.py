"""The instant transfer: B's colours and texture on A's detail by semantic correspondence, without any training."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import check_mask, check_picture, resize, short_side_size, sides
from ..masks import composite
from ..settings import InstantSettings
from ..vit.backbone import Backbone
from .correspondence import MATCH_PATCHES, Correspondence
from .filters import guided_filter, local_contrast, pull_push_fill, to_grey
from .patchmatch import synthesise

COHERENCE = 2
"""Neighbours this many patches away vote on a match."""

PATCH_PIXELS = 16
"""Pixels per patch of the working size, whatever the ViT's own patch."""

FIELD_SCALE = 4
"""Pixels of the working size per cell of the refined field of descriptors."""

SYNTHESIS_SCALE = 2
"""Pixels of the working size per pixel that is painted with B's."""

CONTRAST_WEIGHT = 0.05
"""Weight of the local contrast beside the descriptors in the guide of that painting."""

OUTSIDE_COST = 4.0
"""Cost of a match outside the mask: that of descriptors which are opposites."""

FIELD_DIMENSIONS = 24
"""Principal components of the descriptors that decide between matches at that finer scale."""

COLOUR_RADIUS, COLOUR_VARIANCE = 10, 1e-3
"""Guided filter that fits B's colours to A's edges: pixels of the working size, and the variance of an edge."""

DETAIL_VARIANCE = 1e-2
"""Variance above which A's own edges count as shape, which the colours carry, and not as detail."""

FIELD_RADIUS, FIELD_VARIANCE = 6, 2e-4
"""Guided filter that fits the descriptors to the picture's edges: cells of the field, and the variance of an edge."""


@dataclass(frozen=True)
class InstantTransfer:
    """The structure picture A in the colours and texture of the appearance picture B.

    Attributes:
        structure: `[1, 3, H, W]`, the whole of A.
        gain: `[1, 3, h, w]` and
        offset: `[1, 3, h, w]`: colour = gain · grey(A) + offset, at the working size, locally linear in A's edges.
        own_gain: `[1, 1, h, w]` and
        own_offset: `[1, 1, h, w]`: the same fit of A's own grey; what exceeds it is A's detail.
        texture: `[1, 3, h, w]`, what of B's pixels those colours do not hold.
        settings: Share of texture and feather.
        mask: `[1, 1, H', W']` in 0..1, where A is to change; None is everywhere.
    """

    structure: Tensor
    gain: Tensor
    offset: Tensor
    own_gain: Tensor
    own_offset: Tensor
    texture: Tensor
    settings: InstantSettings
    mask: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        structure: Tensor,
        appearance: Tensor,
        backbone: Backbone,
        settings: InstantSettings = InstantSettings(),  # noqa: B008 (frozen)
        structure_mask: Tensor | None = None,
        appearance_mask: Tensor | None = None,
        short_patches: int = MATCH_PATCHES,
    ) -> "InstantTransfer":
        """Matches the pictures and gathers B's colours and texture for every place of A.

        Args:
            structure: A, `[1, 3, H, W]` in 0..1.
            appearance: B, likewise, of any size.
            backbone: The ViT whose features are matched.
            settings: Match passes, texture and feather. From the second pass on the ViT gets the painted picture too,
                which finds more of the parts; each pass costs about as much as the first.
            structure_mask: `[1, 1, H, W]` in 0..1, of any size: where A is to change.
            appearance_mask: Likewise: the part of B that is the appearance.
            short_patches: Fineness of the matching: patches along the short side.

        Raises:
            SpliceError: A picture or a mask that cannot be worked with.
        """
        structure = check_picture(structure, "structure picture").to(backbone.device)
        appearance = check_picture(appearance, "appearance picture").to(backbone.device)
        if structure_mask is not None:
            structure_mask = check_mask(structure_mask, "structure mask").to(backbone.device)
        if appearance_mask is not None:
            appearance_mask = check_mask(appearance_mask, "appearance mask").to(backbone.device)
        match = Correspondence.between(
            structure, appearance, backbone, short_patches, source_mask=structure_mask, target_mask=appearance_mask
        )
        result = cls._from_match(match, structure, appearance, settings, structure_mask, appearance_mask)
        for _ in range(settings.match_passes - 1):
            painted = result.painted(short_patches * PATCH_PIXELS)
            again = match.refine(painted, backbone, mask=None if appearance_mask is None else structure_mask)
            result = cls._from_match(again, structure, appearance, settings, structure_mask, appearance_mask)
        return result

    @classmethod
    def _from_match(
        cls,
        match: Correspondence,
        structure: Tensor,
        appearance: Tensor,
        settings: InstantSettings,
        structure_mask: Tensor | None,
        appearance_mask: Tensor | None,
    ) -> "InstantTransfer":
        a, b = (
            resize(picture, (grid[0] * PATCH_PIXELS, grid[1] * PATCH_PIXELS))
            for picture, grid in ((structure, match.source_grid), (appearance, match.target_grid))
        )
        region = None if appearance_mask is None else resize(appearance_mask, sides(b))
        painted = resize(_paint(match, a, b, region), sides(a))
        grey = to_grey(a)
        gain, offset = guided_filter(grey, painted, COLOUR_RADIUS, COLOUR_VARIANCE)
        own_gain, own_offset = guided_filter(grey, grey, COLOUR_RADIUS, DETAIL_VARIANCE)
        texture = painted - gain * grey - offset
        return cls(structure, gain, offset, own_gain, own_offset, texture, settings, structure_mask)

    @torch.no_grad()
    def image(self, size: int | None = None) -> Tensor:
        """The picture, painted where the mask allows it. Past the mask and its feather it is exactly A.

        Args:
            size: Short side in pixels; None is A's full size.

        Returns:
            `[1, 3, H, W]` in 0..1.
        """
        painted = self.painted(size)
        if self.mask is None:
            return painted
        picture = self._structure_at(size)
        feather = self.settings.feather * min(sides(picture)) / min(sides(self.structure))
        return composite(picture, painted, self.mask, feather)

    @torch.no_grad()
    def painted(self, size: int | None = None) -> Tensor:
        """The picture painted everywhere, also where the mask does not allow it; arguments as for `image`."""
        picture = self._structure_at(size)
        grey, at = to_grey(picture), sides(picture)
        detail = grey - resize(self.own_gain, at) * grey - resize(self.own_offset, at)
        colours = resize(self.gain, at) * grey + resize(self.offset, at)
        return (colours + detail + self.settings.texture * resize(self.texture, at)).clamp(0, 1)

    def _structure_at(self, size: int | None) -> Tensor:
        """A with a short side of so many pixels, or at its full size."""
        at = sides(self.structure)
        return resize(self.structure, at if size is None else short_side_size(*at, size))


def _paint(match: Correspondence, a: Tensor, b: Tensor, region: Tensor | None) -> Tensor:
    """A in the pixels of a region of B, at 1 / `SYNTHESIS_SCALE` of the size of `a` and `b`."""
    basis = _principal_directions(torch.cat([match.source, match.target]), FIELD_DIMENSIONS)
    guides: list[Tensor] = []
    for picture, descriptors, grid in ((a, match.source, match.source_grid), (b, match.target, match.target_grid)):
        fine = _fine_descriptors(descriptors @ basis, grid, picture)
        small = resize(picture, (picture.shape[-2] // SYNTHESIS_SCALE, picture.shape[-1] // SYNTHESIS_SCALE))
        guides.append(torch.cat([resize(fine, sides(small)), CONTRAST_WEIGHT * local_contrast(small)], dim=1))
    guide, exemplar_guide = guides
    exemplar = resize(b if region is None else pull_push_fill(b, region), sides(exemplar_guide))
    cost = None if region is None else OUTSIDE_COST * (1 - resize(region, sides(exemplar)))
    patches = (torch.arange(n, device=a.device) for n in match.source_grid)
    steps = match.matches(COHERENCE) - torch.stack(torch.meshgrid(*patches, indexing="ij"))
    return synthesise(exemplar, guide, exemplar_guide, steps * (PATCH_PIXELS // SYNTHESIS_SCALE), cost)


def _principal_directions(x: Tensor, count: int) -> Tensor:
    """`[D, count]`: orthonormal directions that hold most of the rows of `[N, D]`, by subspace iteration.

    torch's own routine starts from the global random state, so that a run would neither repeat nor leave it alone.
    """
    start = torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(0)).to(x.device)
    for _ in range(4):
        start = torch.linalg.qr(x.T @ (x @ start)).Q
    return start


def _fine_descriptors(descriptors: Tensor, grid: tuple[int, int], picture: Tensor) -> Tensor:
    """Descriptors of the patches at the fine scale, with the picture's edges: `[1, C, h, w]`."""
    height, width = sides(picture)
    picture = resize(picture, (height // FIELD_SCALE, width // FIELD_SCALE))
    wide = F.interpolate(descriptors.T.reshape(1, -1, *grid), sides(picture), mode="bilinear", align_corners=False)
    grey = to_grey(picture)
    gain, offset = guided_filter(grey, wide, FIELD_RADIUS, FIELD_VARIANCE)
    return gain * grey + offset
