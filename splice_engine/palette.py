"""The instant transfer: B's colours and texture on A's detail by semantic correspondence, without any training."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone
from .correspondence import SHORT_PATCHES, Correspondence
from .images import check_picture, resize, short_side_size, sides
from .synthesis import synthesise

COHERENCE = 2
"""Patches whose neighbours vote on a match."""

PATCH_PIXELS = 14
"""Pixels per patch of the working size, whatever the ViT's own patch."""

FIELD_SCALE = 4
"""Pixels of the working size per cell of the refined field of matches."""

SYNTHESIS_SCALE = 2
"""Pixels of the working size per pixel that is painted with B's."""

RELIEF = 0.05
"""Weight beside the descriptors of the locally normalised grey, which guides that painting too."""

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
    """

    structure: Tensor
    gain: Tensor
    offset: Tensor
    own_gain: Tensor
    own_offset: Tensor
    texture: Tensor

    @classmethod
    @torch.no_grad()
    def between(
        cls, structure: Tensor, appearance: Tensor, backbone: Backbone, short_patches: int = SHORT_PATCHES
    ) -> "Palette":
        """Matches the pictures and gathers B's look for every place of A.

        Args:
            structure: A, `[1, 3, H, W]` in 0..1.
            appearance: B, likewise, of any size.
            backbone: The ViT that finds the matches.
            short_patches: Fineness of the matching: patches along the short side.

        Raises:
            SpliceError: A picture that cannot be worked with.
        """
        structure = check_picture(structure, "structure picture").to(backbone.device)
        appearance = check_picture(appearance, "appearance picture").to(backbone.device)
        match = Correspondence.between(structure, appearance, backbone, short_patches)
        a, b = (
            resize(picture, (grid[0] * PATCH_PIXELS, grid[1] * PATCH_PIXELS))
            for picture, grid in ((structure, match.source_grid), (appearance, match.target_grid))
        )
        painted = resize(_paint(match, a, b), sides(a))
        grey = _grey(a)
        gain, offset = _guided(grey, painted, RADIUS, SHARPNESS)
        own_gain, own_offset = _guided(grey, grey, RADIUS, DETAIL_SHARPNESS)
        return cls(structure, gain, offset, own_gain, own_offset, painted - gain * grey - offset)

    @torch.no_grad()
    def image(self, size: int | None = None, texture: float = TEXTURE) -> Tensor:
        """The painted picture.

        Args:
            size: Short side in pixels; None is A's full size.
            texture: Share of B's texture that is laid on, from 0 for colours alone to 1.

        Returns:
            `[1, 3, H, W]` in 0..1.
        """
        picture = self.structure
        if size is not None:
            picture = resize(picture, short_side_size(*sides(picture), size))
        grey, at = _grey(picture), sides(picture)
        detail = grey - resize(self.own_gain, at) * grey - resize(self.own_offset, at)
        colours = resize(self.gain, at) * grey + resize(self.offset, at)
        return (colours + detail + texture * resize(self.texture, at)).clamp(0, 1)


def _grey(picture: Tensor) -> Tensor:
    weights = picture.new_tensor(GREY).view(1, 3, 1, 1)
    return (picture * weights).sum(dim=1, keepdim=True)


def _box_mean(x: Tensor, radius: int) -> Tensor:
    x = F.pad(x, [radius] * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(x, (1, 2 * radius + 1), 1), (2 * radius + 1, 1), 1)


def _guided(guide: Tensor, picture: Tensor, radius: int, sharpness: float) -> tuple[Tensor, Tensor]:
    """Guided filter (He et al., 2013): gain and offset with which the guide `[1, 1, H, W]` locally explains a picture.

    Both are smooth enough to be enlarged and applied to a larger guide (He and Sun, "Fast Guided Filter", 2015).
    """

    def mean(x: Tensor) -> Tensor:
        return _box_mean(x, radius)

    guide_mean, picture_mean = mean(guide), mean(picture)
    gain = (mean(guide * picture) - guide_mean * picture_mean) / (mean(guide**2) - guide_mean**2 + sharpness)
    return mean(gain), mean(picture_mean - gain * guide_mean)


def _paint(match: Correspondence, a: Tensor, b: Tensor) -> Tensor:
    """A in B's pixels, at 1 / `SYNTHESIS_SCALE` of the size of `a` and `b`."""
    basis = _principal_directions(torch.cat([match.source, match.target]), FIELD_DIMENSIONS)
    fine_a = _fine_descriptors(match.source @ basis, match.source_grid, a)
    fine_b = _fine_descriptors(match.target @ basis, match.target_grid, b)
    small_a, small_b = (
        resize(picture, (picture.shape[-2] // SYNTHESIS_SCALE, picture.shape[-1] // SYNTHESIS_SCALE))
        for picture in (a, b)
    )
    guide, look_guide = (
        torch.cat([resize(fine, sides(small)), RELIEF * _relief(small)], dim=1)
        for fine, small in ((fine_a, small_a), (fine_b, small_b))
    )
    offsets = _refined_offsets(match, fine_a, fine_b)
    return synthesise(small_b, guide, look_guide, offsets * (FIELD_SCALE // SYNTHESIS_SCALE))


def _relief(picture: Tensor) -> Tensor:
    """Grey relative to its surroundings' mean and spread, within ±2: `[1, 1, H, W]`. It tells light from shade."""
    grey = _grey(picture)
    mean = _box_mean(grey, RELIEF_RADIUS)
    spread = (_box_mean((grey - mean) ** 2, RELIEF_RADIUS)).sqrt()
    return ((grey - mean) / (spread + 0.03)).clamp(-2, 2)


def _refined_offsets(match: Correspondence, fine_a: Tensor, fine_b: Tensor) -> Tensor:
    """Where in B each place of A finds its look: `[2, h, w]` steps (rows, columns) in cells of `FIELD_SCALE` pixels.

    Patches are coarse, so each cell chooses among the matches of its patch and of the eight around it, by descriptors
    that are brought to the cells along the pictures' own edges.
    """
    (height, width), (b_height, b_width) = sides(fine_a), sides(fine_b)
    rows = torch.arange(height, device=fine_a.device).view(-1, 1)
    columns = torch.arange(width, device=fine_a.device).view(1, -1)

    target = match.matches(COHERENCE).float()
    here = torch.stack(
        torch.meshgrid(*(torch.arange(n, device=fine_a.device) for n in match.source_grid), indexing="ij")
    )
    step = (target - here) * (height / match.source_grid[0])
    patch_row = (rows * match.source_grid[0] // height).flatten()
    patch_column = (columns * match.source_grid[1] // width).flatten()
    costs, offsets = [], []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            near = step[:, (patch_row + down).clamp(0, match.source_grid[0] - 1)]
            near = near[:, :, (patch_column + right).clamp(0, match.source_grid[1] - 1)]
            row = (rows + near[0]).round().clamp(0, b_height - 1).long()
            column = (columns + near[1]).round().clamp(0, b_width - 1).long()
            costs.append((fine_a[0] - fine_b[0][:, row, column]).square().sum(dim=0))
            offsets.append(torch.stack([row - rows, column - columns]))
    cost = F.avg_pool2d(F.pad(torch.stack(costs)[None], [2] * 4, mode="replicate"), 5, 1)[0]
    choice = cost.argmin(dim=0)
    return torch.stack(offsets).gather(0, choice.expand(1, 2, -1, -1))[0]


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
