"""The instant transfer of a clip: what one frame is painted with is carried along the motion to the next."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpliceError
from ..images import LEAST_MASK, check_mask, check_picture, resize, sides
from ..masks import composite
from ..settings import InstantSettings
from ..vit.backbone import Backbone
from .flow import consistent, nearest_places, optical_flow
from .guide import SEARCH_SCALE
from .instant import InstantTransfer

NEW_SHARE = 0.06
"""Share of a frame that has come into view from which it is matched. Until then what lies beside it reaches into it."""

LEAST_CONSISTENT = 0.5
"""Share of a frame in which the motion can be followed, below which another scene has begun."""

NEW_MARGIN = 2
"""Cells around what has come into view that are matched with it."""


class InstantClip:
    """Paints the frames of a clip one after the other, without training.

        clip = InstantClip(appearance, backbone)
        results = (clip.apply(frame) for frame in frames)

    The first frame is an instant transfer. From then on each patch of B stays on the part of the clip that it was
    matched to: its place follows the optical flow, so that the texture moves as the clip does. What comes into view is
    matched when there is enough of it, and a new scene is matched anew.

    Args:
        appearance: B, `[1, 3, H', W']` in 0..1.
        backbone: The ViT whose features are matched.
        settings: As for `InstantTransfer.between`.
        appearance_mask: `[1, 1, H', W']` in 0..1, of any size: the part of B that is the appearance.

    Raises:
        SpliceError: A picture or a mask that cannot be worked with.
    """

    def __init__(
        self,
        appearance: Tensor,
        backbone: Backbone,
        settings: InstantSettings = InstantSettings(),  # noqa: B008 (frozen)
        appearance_mask: Tensor | None = None,
    ) -> None:
        self.appearance = check_picture(appearance, "appearance picture")
        self.backbone, self.settings = backbone, settings
        self.appearance_mask = None if appearance_mask is None else check_mask(appearance_mask, "appearance mask")
        self._before: InstantTransfer | None = None
        self._new = torch.zeros(())

    @torch.no_grad()
    def apply(self, frame: Tensor, mask: Tensor | None = None) -> Tensor:
        """The next frame of the clip in the appearance of B.

        Args:
            frame: `[1, 3, H, W]` in 0..1, of the size of those before.
            mask: `[1, 1, h, w]` in 0..1, where it may change. One that selects nothing leaves the frame as it is.

        Returns:
            `[1, 3, H, W]` in 0..1, on the backbone's device.

        Raises:
            SpliceError: A frame of another size, or OpenCV is not installed.
        """
        frame = check_picture(frame, "frame").to(self.backbone.device)
        self._before = self._match(frame) if self._before is None else self._follow(self._before, frame)
        if mask is None:
            return self._before.image()
        if mask.max() < LEAST_MASK:
            return frame
        return composite(frame, self._before.image(), mask.to(frame.device), self.settings.feather)

    def _match(self, frame: Tensor) -> InstantTransfer:
        """The instant transfer of a frame as if it were the first."""
        found = InstantTransfer.between(
            frame, self.appearance, self.backbone, self.settings, appearance_mask=self.appearance_mask
        )
        self._new = torch.zeros(sides(found.offsets), dtype=torch.bool, device=frame.device)
        return replace(found, sampling="bilinear")

    def _follow(self, before: InstantTransfer, frame: Tensor) -> InstantTransfer:
        """The transfer of a frame, carried from that of the frame before it."""
        if sides(frame) != sides(before.structure):
            raise SpliceError("the frames of a clip must be of one size: resize them")
        height, width = sides(before.offsets)
        there, here = (
            resize(picture, (SEARCH_SCALE * height, SEARCH_SCALE * width)) for picture in (before.structure, frame)
        )
        flow = optical_flow(here, there)
        follows = F.avg_pool2d(consistent(flow, optical_flow(there, here)).float(), SEARCH_SCALE) > 0.5
        if follows.float().mean() < LEAST_CONSISTENT:
            return self._match(frame)
        motion = F.avg_pool2d(flow, SEARCH_SCALE)[0].flip(0) / SEARCH_SCALE
        rows, columns = (torch.arange(side, device=frame.device) for side in (height, width))
        row, column = rows[:, None] + motion[0].round().long(), columns + motion[1].round().long()
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        row, column = row.clamp(0, height - 1), column.clamp(0, width - 1)
        # The fraction of a pixel is kept: a patch moves as smoothly as what it lies on.
        offsets = before.offsets[:, row, column] + motion
        near = nearest_places(follows[0, 0] & inside)  # not a mean of offsets, which would lead to neither's patch
        offsets = offsets[:, near[0], near[1]]
        regions = before.regions[..., row, column][..., near[0], near[1]]
        self._new = self._new[row, column] | ~inside
        if self._new.float().mean() > NEW_SHARE:
            side = 2 * NEW_MARGIN + 1
            new = F.max_pool2d(self._new.float()[None, None], side, 1, NEW_MARGIN)[0, 0] > 0
            again = self._match(frame)
            offsets = torch.where(new, again.offsets, offsets)
            regions = torch.where(new, again.regions, regions)
        return before.carry(frame, offsets, regions)
