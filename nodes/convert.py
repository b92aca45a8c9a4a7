"""ComfyUI's pictures and masks as the engine's, and back.

ComfyUI calls nodes in inference mode, whose tensors can never take part in training. So everything here that makes
engine tensors copies, and must be called inside `memory.engine_context`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.model_management as mm
import torch
from torch import Tensor

from ..splice_engine import Features, SpliceError
from ..splice_engine.images import check_picture


def from_image(image: Tensor, what: str) -> list[Tensor]:
    """An IMAGE `[B, H, W, C]` as engine pictures `[1, 3, H, W]`, checked and copied to the CPU.

    Grey becomes RGB and transparency is dropped, as ComfyUI's own nodes do.

    Args:
        image: float, 0..1.
        what: How to call it in an error message.

    Raises:
        SpliceError: An empty batch, or a picture that cannot be worked with.
    """
    if not len(image):
        raise SpliceError(f"the {what} is an empty batch: fix the node that made it")
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)
    copies = image.movedim(-1, 1).to("cpu", torch.float32, copy=True).contiguous()
    return [check_picture(picture, what) for picture in copies.split(1)]


def from_mask(mask: Tensor | None) -> Tensor | None:
    """A MASK `[B, h, w]` as engine masks `[B, 1, h, w]`, copied to the CPU.

    An all-zero one is none: `LoadImage` gives such, of 64x64 pixels, for every picture without transparency.
    """
    return None if mask is None or not mask.any() else mask[:, None].to("cpu", torch.float32, copy=True)


def to_image(pictures: Sequence[Tensor]) -> Tensor:
    """Engine pictures `[B, 3, H, W]` of one size as an IMAGE."""
    return torch.cat(list(pictures)).detach().clamp(0, 1).movedim(1, -1).to(mm.intermediate_device())


def to_mask(masks: Tensor) -> Tensor:
    """Engine masks `[B, 1, H, W]` as a MASK."""
    return masks[:, 0].detach().clamp(0, 1).to(mm.intermediate_device())


def to_intermediate(features: Features) -> Features:
    """Moves features to where ComfyUI keeps what passes between nodes."""
    device = mm.intermediate_device()
    return replace(
        features,
        cls=features.cls.to(device),
        tokens=features.tokens.to(device),
        prefix=features.prefix.to(device),
    )


@dataclass(frozen=True)
class ImagePair:
    """What one run works on: engine pictures `[1, 3, H, W]`, and engine masks `[1, 1, H, W]` of any sizes or None."""

    structure: Tensor
    appearance: Tensor
    structure_mask: Tensor | None
    appearance_mask: Tensor | None

    @property
    def masks(self) -> dict[str, Tensor | None]:
        """The masks by the engine's names."""
        return {"structure_mask": self.structure_mask, "appearance_mask": self.appearance_mask}


def split_pairs(
    structure: Tensor,
    appearance: Tensor,
    structure_mask: Tensor | None = None,
    appearance_mask: Tensor | None = None,
) -> list[ImagePair]:
    """Splits two IMAGEs and their MASKs into pairs: one for each structure picture.

    Raises:
        SpliceError: Of anything else there is neither one for all pairs nor one for each, or a picture cannot be worked
            with.
    """
    a = from_image(structure, "structure picture")
    b = _repeat(from_image(appearance, "appearance picture"), len(a), "appearance pictures")
    a_masks, b_masks = (
        _repeat([None] if mask is None else list(mask.split(1)), len(a), f"{what} masks")
        for what, mask in (("structure", structure_mask), ("appearance", appearance_mask))
    )
    return [
        ImagePair(*pictures, *(from_mask(mask) for mask in masks))
        for pictures, masks in zip(zip(a, b, strict=True), zip(a_masks, b_masks, strict=True), strict=True)
    ]


def _repeat(given: list, count: int, what: str) -> list:
    if len(given) not in (1, count):
        raise SpliceError(f"{count} structure pictures need 1 or {count} {what}, not {len(given)}")
    return given * (count // len(given))
