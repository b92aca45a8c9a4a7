"""The instant transfer: B's colours and texture on A's detail by semantic correspondence, without any training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..images import check_mask, check_picture, resize, short_side_size, sides
from ..masks import composite
from ..settings import InstantSettings
from ..vit.backbone import Backbone
from .correspondence import Correspondence
from .descriptors import MATCH_PATCHES, find_outlines
from .detail import detail_share, find_spots, lay_detail, seam_gain, variance_around
from .filters import LocalFit, guided_filter, pull_push_fill, to_grey
from .guide import PATCH_PIXELS, SEARCH_SCALE, find_patches
from .painting import paint, paint_in_bands, sample
from .parts import divide_into_parts, find_thin_parts

OUTSIDE_COST = 4.0
"""Cost of a match outside the mask: that of descriptors which are opposites."""

COLOUR_RADIUS, COLOUR_VARIANCE = 10, 1e-3
"""Guided filter that fits B's colours to A's edges: pixels of the working size, and the variance of an edge."""

DETAIL_VARIANCE = 1e-2
"""Variance above which A's own edges count as shape, which the colours carry, and not as detail."""


@dataclass(frozen=True)
class InstantTransfer:
    """The structure picture A in the colours and texture of the appearance picture B.

    Attributes:
        structure: `[1, 3, H, W]`, the whole of A.
        colours: B's, as A's colours explain them at the working size: they follow A's edges.
        smooth: The same fit of A's grey to itself; what exceeds it is A's detail.
        spots: `[1, 1, h, w]`: where that is kept whatever B's texture, see `find_spots`.
        gain: `[1, 1, h, w]` in 0..1: what is left of the texture where its patches have seams, see `seam_gain`.
        regions: `[1, 2, h/2, w/2]` in 0..1: outlines of A's parts, see `find_outlines`, but for those of thin ones, and
            its background.
        exemplar: `[1, 3, H', W']`, B; of a part of it, filled up with that part's colours.
        offsets: `[2, h/2, w/2]`, the patches of B and of its mirror image with which A is painted.
        exemplar_size: (height, width) of B where the offsets are pixels.
        settings: Share of texture and feather.
        mask: `[1, 1, H', W']` in 0..1, where A is to change; None is everywhere.
        sampling: How texture is taken from between B's pixels: "nearest" is sharper, "bilinear" moves as smoothly as A.
    """

    structure: Tensor
    colours: LocalFit
    smooth: LocalFit
    spots: Tensor
    gain: Tensor
    regions: Tensor
    exemplar: Tensor
    offsets: Tensor
    exemplar_size: tuple[int, int]
    settings: InstantSettings
    mask: Tensor | None = None
    sampling: str = "nearest"

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
            structure,
            appearance,
            backbone,
            short_patches,
            source_mask=structure_mask,
            target_mask=appearance_mask,
            density=settings.density,
        )
        found = match
        for left in reversed(range(settings.match_passes)):
            result = cls._from_match(found, left == 0, structure, appearance, settings, structure_mask, appearance_mask)
            if left:
                painted = result.painted(short_patches * PATCH_PIXELS)
                found = match.refine(painted, backbone, mask=None if appearance_mask is None else structure_mask)
        return result

    @classmethod
    def _from_match(
        cls,
        match: Correspondence,
        is_last: bool,
        structure: Tensor,
        appearance: Tensor,
        settings: InstantSettings,
        structure_mask: Tensor | None,
        appearance_mask: Tensor | None,
    ) -> "InstantTransfer":
        cell = PATCH_PIXELS // match.density
        a, b = (
            resize(picture, (grid[0] * cell, grid[1] * cell))
            for picture, grid in ((structure, match.source_grid), (appearance, match.target_grid))
        )
        exemplar, cost = appearance, None
        if appearance_mask is not None:
            exemplar = pull_push_fill(appearance, resize(appearance_mask, sides(appearance)))
            cost = OUTSIDE_COST * (1 - resize(appearance_mask, sides(b)))
            b = resize(exemplar, sides(b))
        outlines = find_outlines(match.source, match.source_grid, match.density)
        match, *backgrounds = divide_into_parts(match)
        offsets, exemplar_size = find_patches(match, a, b, cost, backgrounds, is_last)
        outlines = outlines * (1 - find_thin_parts(backgrounds[0], match.density))
        regions = resize(torch.cat([outlines, backgrounds[0]], dim=1), sides(offsets))
        return cls._from_offsets(offsets, regions, exemplar_size, exemplar, structure, settings, structure_mask)

    @classmethod
    def _from_offsets(
        cls,
        offsets: Tensor,
        regions: Tensor,
        exemplar_size: tuple[int, int],
        exemplar: Tensor,
        structure: Tensor,
        settings: InstantSettings,
        structure_mask: Tensor | None,
        sampling: str = "nearest",
    ) -> "InstantTransfer":
        a, b = (
            resize(picture, (SEARCH_SCALE * height, SEARCH_SCALE * width))
            for picture, (height, width) in ((structure, sides(offsets)), (exemplar, exemplar_size))
        )
        painted = paint(b, offsets, sides(a), mirrored=True)
        own = sample(variance_around(b), offsets, exemplar_size, sides(offsets), mirrored=True)
        grey = to_grey(a)
        smooth = guided_filter(grey, grey, COLOUR_RADIUS, DETAIL_VARIANCE)
        return cls(
            structure,
            guided_filter(a, painted, COLOUR_RADIUS, COLOUR_VARIANCE),
            smooth,
            find_spots(grey, smooth.apply(grey)),
            seam_gain(painted, own),
            regions,
            exemplar,
            offsets,
            exemplar_size,
            settings,
            structure_mask,
            sampling,
        )

    @torch.no_grad()
    def carry(self, structure: Tensor, offsets: Tensor, regions: Tensor) -> "InstantTransfer":
        """The transfer of another frame of a clip, with patches that are known.

        Args:
            structure: The frame, `[1, 3, H, W]` in 0..1, of this one's size.
            offsets: `[2, h, w]`, as this one's; they need not be whole pixels.
            regions: `[1, 2, h, w]`, likewise.
        """
        return self._from_offsets(
            offsets, regions, self.exemplar_size, self.exemplar, structure, self.settings, self.mask, "bilinear"
        )

    @torch.no_grad()
    def image(self, size: int | None = None) -> Tensor:
        """The picture, painted where the mask allows it. Past the mask and its feather it is exactly A.

        Args:
            size: Short side in pixels; None is A's full size.

        Returns:
            `[1, 3, H, W]` in 0..1.
        """
        return self.composite(self.painted(size))

    def composite(self, painted: Tensor) -> Tensor:
        """A painted picture of any size, `[1, 3, h, w]`, laid into A at that size where the mask allows it."""
        if self.mask is None:
            return painted
        picture = resize(self.structure, sides(painted))
        feather = self.settings.feather * min(sides(picture)) / min(sides(self.structure))
        return composite(picture, painted, self.mask, feather)

    @torch.no_grad()
    def painted(self, size: int | None = None) -> Tensor:
        """The picture painted everywhere, also where the mask does not allow it; arguments as for `image`."""
        return self.join(*self.layers(size))

    def layers(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        """B's colours at A's edges, and B's texture, which is laid over them: `[1, 3, H, W]` each, as for `image`."""
        picture = self._structure_at(size)
        colours = self.colours.apply(picture)
        texture = self._paint_with_exemplar(sides(picture)).sub_(colours)
        return colours, texture.mul_(resize(self.gain, sides(picture)))

    def join(self, colours: Tensor, texture: Tensor) -> Tensor:
        """The picture of both layers and of A's own detail, to which the texture gives way."""
        grey, base, scale = self._grey_at(sides(colours))
        return lay_detail(colours, texture, grey, base, self.spots, self.regions, self.settings.texture, scale)

    def detail_share(self, size: int | None = None) -> Tensor:
        """How far B's texture gives way to A's detail, `[1, 1, H, W]` in 0..1; arguments as for `image`."""
        _, texture = self.layers(size)
        grey, base, scale = self._grey_at(sides(texture))
        return detail_share(grey, base, to_grey(texture), self.regions, self.settings.texture, scale)

    def _grey_at(self, at: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
        """A's grey at some size, its smooth part, and the pixels per pixel of the working size."""
        grey = to_grey(resize(self.structure, at))
        return grey, self.smooth.apply(grey), min(at) / min(sides(self.spots))

    def _paint_with_exemplar(self, at: tuple[int, int]) -> Tensor:
        """A of some size in B's pixels alone, as sharp as B is at that scale."""
        exemplar_at = [
            round(side * to / of) for side, to, of in zip(self.exemplar_size, at, sides(self.offsets), strict=True)
        ]
        exemplar = resize(self.exemplar, (exemplar_at[0], exemplar_at[1]))
        return paint_in_bands(exemplar, self.offsets, at, mirrored=True, sampling=self.sampling)

    def _structure_at(self, size: int | None) -> Tensor:
        """A with a short side of so many pixels, or at its full size."""
        at = sides(self.structure)
        return resize(self.structure, at if size is None else short_side_size(*at, size))
