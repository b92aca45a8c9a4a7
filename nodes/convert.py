"""ComfyUI's pictures and masks as the engine's, and back.

ComfyUI calls nodes in inference mode, whose tensors can never take part in training. So everything here that makes
engine tensors copies, and must be called inside `memory.engine_context`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import comfy.model_management as mm
import torch
from torch import Tensor

from ..splice_engine import Features, SpliceError
from ..splice_engine.images import LEAST_MASK, check_mask, check_picture


def from_image(image: Tensor, what: str) -> list[Tensor]:
    """An IMAGE `[B, H, W, C]` as engine pictures `[1, 3, H, W]`, checked and copied to the CPU.

    Grey becomes RGB and transparency is dropped, as ComfyUI's own nodes do.

    Args:
        image: float, 0..1.
        what: How to call it in an error message.

    Raises:
        SpliceError: An empty batch, or a picture that cannot be worked with.
    """
    check_image(image, what)
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)
    copies = image.movedim(-1, 1).to("cpu", torch.float32, copy=True).contiguous()
    return [check_picture(picture, what) for picture in copies.split(1)]


def check_image(image: Tensor, what: str) -> None:
    """Checks that there is a batch of pictures; `from_image` checks the pictures too.

    Raises:
        SpliceError: Another shape, or an empty batch.
    """
    if image.ndim != 4:
        shape = list(image.shape)
        raise SpliceError(f"the {what} must be an IMAGE [B, H, W, C], not {shape}: fix the node that made it")
    if not len(image):
        raise SpliceError(f"the {what} is an empty batch: fix the node that made it")


def from_mask(mask: Tensor | None, what: str = "mask") -> Tensor | None:
    """A MASK as engine masks `[B, 1, h, w]`, copied to the CPU.

    One that is zero as a whole is none: `LoadImage` gives such, of 64x64 pixels, where there is no transparency.

    Args:
        mask: `[B, h, w]`; other nodes give `[h, w]`, `[B, 1, h, w]` or `[B, h, w, 1]` too.
        what: How to call it in an error message.

    Raises:
        SpliceError: Another shape.
    """
    if mask is None or not mask.any():
        return None
    shape = list(mask.shape)
    if mask.ndim == 4 and 1 in (mask.shape[1], mask.shape[3]):
        mask = mask[:, 0] if mask.shape[1] == 1 else mask[..., 0]
    elif mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise SpliceError(f"the {what} must be a MASK [B, H, W], not {shape}: fix the node that made it")
    return mask[:, None].to("cpu", torch.float32, copy=True)


def is_empty(mask: Tensor | None) -> bool:
    """Whether a mask among others selects nothing: of a clip's masks, where the object is not in the frame."""
    return mask is not None and bool(mask.max() < LEAST_MASK)


def to_image(pictures: Sequence[Tensor]) -> Tensor:
    """Engine pictures `[B, 3, H, W]` of one size as an IMAGE."""
    return torch.cat(list(pictures)).detach().clamp(0, 1).movedim(1, -1).to(mm.intermediate_device(), image_dtype())


def to_mask(masks: Tensor) -> Tensor:
    """Engine masks `[B, 1, H, W]` as a MASK."""
    return masks[:, 0].detach().clamp(0, 1).to(mm.intermediate_device(), image_dtype())


def image_dtype() -> torch.dtype:
    """The precision in which ComfyUI keeps IMAGEs and MASKs; 0.8 has no choice yet."""
    dtype: torch.dtype = mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32
    return dtype


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

    @property
    def is_left_alone(self) -> bool:
        """Whether one of the masks is empty."""
        return any(map(is_empty, self.masks.values()))


def split_pairs(
    structure: Tensor,
    appearance: Tensor,
    structure_mask: Tensor | None = None,
    appearance_mask: Tensor | None = None,
) -> list[ImagePair]:
    """Splits two IMAGEs and their MASKs into pairs: as many as there are structure or appearance pictures.

    Raises:
        SpliceError: Of anything there is neither one for all pairs nor one for each, each pair has an empty mask, or a
            picture cannot be worked with.
    """
    given = {
        "structure pictures": from_image(structure, "structure picture"),
        "appearance pictures": from_image(appearance, "appearance picture"),
    }
    count = max(len(pictures) for pictures in given.values())
    for what, mask in (("structure", structure_mask), ("appearance", appearance_mask)):
        masks = from_mask(mask, f"{what} mask")
        given[f"{what} masks"] = [None] if masks is None else list(masks.split(1))
    pairs = [ImagePair(*parts) for parts in pair_up(given, count)]
    for pair in pairs:
        for name, mask in pair.masks.items():
            if mask is not None and not pair.is_left_alone:
                check_mask(mask, name.replace("_", " "))  # before the first training, not when its turn comes
    if all(pair.is_left_alone for pair in pairs):
        raise SpliceError("in each pair one of the masks selects nothing: paint what they should select in white")
    return pairs


def pair_up(given: Mapping[str, Sequence], count: int | None = None) -> list[tuple]:
    """Rows of what batches hold; one of a kind is repeated.

    Args:
        given: Batches by their names in the plural.
        count: Of the rows; None is the longest batch.

    Raises:
        SpliceError: A batch has neither one nor as many.
    """
    count = count or max(len(parts) for parts in given.values())
    for what, parts in given.items():
        if len(parts) not in (1, count):
            raise SpliceError(
                f"{count} pairs need 1 or {count} {what}, not {len(parts)}: Image From Batch picks some of a batch"
            )
    return list(zip(*(list(parts) * (count // len(parts)) for parts in given.values()), strict=True))
