"""The pair of pictures that a run trains on, and samples of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..images import resize, short_side_size, sides
from .objective import Targets

FLAT = 1e-3
"""Standard deviation of the channels up to which a picture is of one colour: a quarter of a step of 8 bits."""


@dataclass(frozen=True)
class Pair:
    """The two pictures of a run at the size that it trains at, on its device.

    Attributes:
        structure: `[1, 3, H, W]` in 0..1.
        appearance: `[1, 3, H', W']` in 0..1.
        matched: `[1, 3, H, W]` in 0..1, the matched image, where the run needs it.
        structure_mask: `[1, 1, H, W]` in 0..1, or None.
        appearance_mask: `[1, 1, H', W']` in 0..1, or None.
        number: Of the appearance picture, where a run has several.
    """

    structure: Tensor
    appearance: Tensor
    matched: Tensor | None = None
    structure_mask: Tensor | None = None
    appearance_mask: Tensor | None = None
    number: int = 0


@dataclass
class Sample:
    """A crop of one picture of the pair, or the whole of it, and the same crop of what belongs to it.

    Attributes:
        picture: `[1, 3, h, w]` in 0..1.
        target: `[1, 3, h, w]`, the matched image; of structure samples, where the run has one.
        residual: `[1, 3, h, w]`, what is added to the generator's output; likewise.
        mask: `[1, 1, h, w]` in 0..1, where the picture has a mask.
        features: ViT features that the terms compare with; empty until they are extracted.
    """

    picture: Tensor
    target: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    features: Targets = field(default_factory=dict)


def to_training_size(picture: Tensor, size: int | None) -> Tensor:
    """A picture `[1, 3, H, W]` shrunk to a short side of `size` pixels; a smaller one, or any for None, as it is."""
    height, width = sides(picture)
    if size is not None and size < min(height, width):
        picture = resize(picture, short_side_size(height, width, size))
    return add_noise_if_flat(picture)


def add_noise_if_flat(picture: Tensor) -> Tensor:
    """A picture of one colour with noise far too faint to be seen; any other as it is.

    In the former the generator's normalisation finds nothing to divide by, so that each layer makes gradients a few
    hundred times larger, until none is a number.
    """
    if picture.std(dim=(-2, -1)).max() > FLAT:
        return picture
    noise = torch.rand(picture.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return picture + FLAT * noise.to(picture)
