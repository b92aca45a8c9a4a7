"""The instant transfer: B's colours and texture on A's detail by semantic correspondence, without any training."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone
from .correspondence import SHORT_PATCHES, Correspondence
from .images import check_mask, check_picture, resize, short_side_size, sides
from .masks import FEATHER, composite
from .synthesis import synthesise

COHERENCE = 2
"""Patches whose neighbours vote on a match."""

PATCH_PIXELS = 16
"""Pixels per patch of the working size, whatever the ViT's own patch."""

FIELD_SCALE = 4
"""Pixels of the working size per cell of the refined field of matches."""

SYNTHESIS_SCALE = 2
"""Pixels of the working size per pixel that is painted with B's."""

RELIEF = 0.05
"""Weight beside the descriptors of the locally normalised grey, which guides that painting too."""

OUTSIDE_COST = 4.0
"""Of a match outside the mask: as much as between descriptors that are opposites."""

FIELD_DIMENSIONS = 24
"""Principal components of the descriptors that decide between matches at that finer scale."""

RADIUS, SHARPNESS = 10, 1e-3
"""Of the guided filter that lays B's colours into A's edges: in pixels of the working size, and as a variance."""

RELIEF_RADIUS = 12
"""Pixels around a place that count as its surroundings."""

DETAIL_SHARPNESS = 1e-2
"""Variance above which A's own edges count as shape, which the colours carry, and not as detail."""

TEXTURE = 0.8
"""Share of B's texture in the picture; A's own detail shows the better, the lower it is."""

GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Palette:
    """The structure picture A in the colours and texture of the appearance picture B.

    Attributes:
        structure: `[1, 3, H, W]`, the whole of A.
        gain: `[1, 3, h, w]` and
        offset: `[1, 3, h, w]`: colour = gain · grey(A) + offset, at the working size, locally linear in A's edges.
        own_gain: `[1, 1, h, w]` and
        own_offset: `[1, 1, h, w]`: A's own grey seen through the same filter; what exceeds it is A's detail.
        texture: `[1, 3, h, w]`, what of B's look those colours do not hold.
        mask: `[1, 1, H', W']` in 0..1, where A is to change; None is everywhere.
    """

    structure: Tensor
    gain: Tensor
    offset: Tensor
    own_gain: Tensor
    own_offset: Tensor
    texture: Tensor
    mask: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def between(
        cls,
        structure: Tensor,
        appearance: Tensor,
        backbone: Backbone,
        short_patches: int = SHORT_PATCHES,
        structure_mask: Tensor | None = None,
        appearance_mask: Tensor | None = None,
        looks: int = 1,
    ) -> "Palette":
        """Matches the pictures and gathers B's look for every place of A.

        Args:
            structure: A, `[1, 3, H, W]` in 0..1.
            appearance: B, likewise, of any size.
            backbone: The ViT that finds the matches.
            short_patches: Fineness of the matching: patches along the short side.
            structure_mask: `[1, 1, H, W]` in 0..1, of any size: where A is to change.
            appearance_mask: Likewise: the part of B whose look is taken.
            looks: How often to match, at least once. From the second time on the ViT sees the painted picture too, by
                which it finds more of the parts; each costs about as much as the first.

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
        palette = cls._painted_by(match, structure, appearance, structure_mask, appearance_mask)
        for _ in range(looks - 1):
            painted = palette.painted(short_patches * PATCH_PIXELS)
            again = match.second_look(painted, backbone, mask=None if appearance_mask is None else structure_mask)
            palette = cls._painted_by(again, structure, appearance, structure_mask, appearance_mask)
        return palette

    @classmethod
    def _painted_by(
        cls,
        match: Correspondence,
        structure: Tensor,
        appearance: Tensor,
        structure_mask: Tensor | None,
        appearance_mask: Tensor | None,
    ) -> "Palette":
        a, b = (
            resize(picture, (grid[0] * PATCH_PIXELS, grid[1] * PATCH_PIXELS))
            for picture, grid in ((structure, match.source_grid), (appearance, match.target_grid))
        )
        region = None if appearance_mask is None else resize(appearance_mask, sides(b))
        painted = resize(_paint(match, a, b, region), sides(a))
        grey = _grey(a)
        gain, offset = _guided(grey, painted, RADIUS, SHARPNESS)
        own_gain, own_offset = _guided(grey, grey, RADIUS, DETAIL_SHARPNESS)
        return cls(structure, gain, offset, own_gain, own_offset, painted - gain * grey - offset, structure_mask)

    @torch.no_grad()
    def image(self, size: int | None = None, texture: float = TEXTURE, feather: float = FEATHER) -> Tensor:
        """The picture, painted where the mask allows it.

        Args:
            size: Short side in pixels; None is A's full size.
            texture: Share of B's texture that is laid on, from 0 for colours alone to 1.
            feather: Pixels of A's full size over which the change fades out beyond the mask. Past them the picture is
                exactly A.

        Returns:
            `[1, 3, H, W]` in 0..1.
        """
        picture = self._at(size)
        painted = self.painted(size, texture)
        if self.mask is None:
            return painted
        return composite(picture, painted, self.mask, feather * min(sides(picture)) / min(sides(self.structure)))

    @torch.no_grad()
    def painted(self, size: int | None = None, texture: float = TEXTURE) -> Tensor:
        """The picture painted everywhere, also where the mask does not allow it; arguments as for `image`."""
        picture = self._at(size)
        grey, at = _grey(picture), sides(picture)
        detail = grey - resize(self.own_gain, at) * grey - resize(self.own_offset, at)
        colours = resize(self.gain, at) * grey + resize(self.offset, at)
        return (colours + detail + texture * resize(self.texture, at)).clamp(0, 1)

    def _at(self, size: int | None) -> Tensor:
        """A with a short side of so many pixels, or at its full size."""
        at = sides(self.structure)
        return resize(self.structure, at if size is None else short_side_size(*at, size))


def _grey(picture: Tensor) -> Tensor:
    weights = picture.new_tensor(GREY).view(1, 3, 1, 1)
    return (picture * weights).sum(dim=1, keepdim=True)


def _box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over the square around each place: a tenth of the time that average pooling takes on CPUs."""
    x = F.pad(x, [radius] * 4, mode="replicate")
    return _window_mean(_window_mean(x, -1, 2 * radius + 1), -2, 2 * radius + 1)


def _window_mean(x: Tensor, dim: int, size: int) -> Tensor:
    """Means of `size` neighbours along one side, from sums over windows of 1, 2, 4 … that `size` is the sum of."""
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


def _guided(guide: Tensor, picture: Tensor, radius: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Guided filter (He et al., 2013): gain and offset with which the guide `[1, 1, H, W]` locally explains a picture.

    Both are smooth enough to be enlarged and applied to a larger guide (He and Sun, "Fast Guided Filter", 2015).
    """

    mean = partial(_box_mean, radius=radius)
    guide_mean, picture_mean = mean(guide), mean(picture)
    gain = (mean(guide * picture) - guide_mean * picture_mean) / (mean(guide**2) - guide_mean**2 + sharpness)
    return mean(gain), mean(picture_mean - gain * guide_mean)


def _paint(match: Correspondence, a: Tensor, b: Tensor, region: Tensor | None) -> Tensor:
    """A in the pixels of a region of B, at 1 / `SYNTHESIS_SCALE` of the size of `a` and `b`."""
    basis = _principal_directions(torch.cat([match.source, match.target]), FIELD_DIMENSIONS)
    guides: list[Tensor] = []
    for picture, descriptors, grid in ((a, match.source, match.source_grid), (b, match.target, match.target_grid)):
        fine = _fine_descriptors(descriptors @ basis, grid, picture)
        small = resize(picture, (picture.shape[-2] // SYNTHESIS_SCALE, picture.shape[-1] // SYNTHESIS_SCALE))
        guides.append(torch.cat([resize(fine, sides(small)), RELIEF * _relief(small)], dim=1))
    guide, look_guide = guides
    look = resize(b if region is None else _spread(b, region), sides(look_guide))
    cost = None if region is None else OUTSIDE_COST * (1 - resize(region, sides(look)))
    patches = (torch.arange(n, device=a.device) for n in match.source_grid)
    steps = match.matches(COHERENCE) - torch.stack(torch.meshgrid(*patches, indexing="ij"))
    return synthesise(look, guide, look_guide, steps * (PATCH_PIXELS // SYNTHESIS_SCALE), cost)


def _relief(picture: Tensor) -> Tensor:
    """Grey relative to its surroundings' mean and spread, within ±2: `[1, 1, H, W]`. It tells light from shade."""
    grey = _grey(picture)
    mean = _box_mean(grey, RELIEF_RADIUS)
    spread = (_box_mean((grey - mean) ** 2, RELIEF_RADIUS)).sqrt()
    return ((grey - mean) / (spread + 0.03)).clamp(-2, 2)


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
    grey = _grey(picture)
    gain, offset = _guided(grey, wide, 6, 2e-4)
    return gain * grey + offset


def _spread(picture: Tensor, weight: Tensor) -> Tensor:
    """The picture where its weight is 1; where it is less, the colours of the nearest places that have some.

    A pyramid of weighted means, read from its coarse end (pull-push: Gortler et al., "The Lumigraph", 1996).
    """
    height, width = sides(weight)
    if height == width == 1:
        return picture
    half = (height + 1) // 2, (width + 1) // 2
    share = F.adaptive_avg_pool2d(weight, half)
    coarse = F.adaptive_avg_pool2d(picture * weight, half) / share.clamp_min(1e-12)
    wide = resize(_spread(coarse, (4 * share).clamp(max=1)), (height, width))
    return torch.lerp(wide, picture, weight)
