"""Renders a generator's output for pictures of any size in bounded memory.

Every layer of the generator is normalised with statistics of the whole picture, so that a picture cannot be rendered in
independent tiles. Large pictures are rendered layer by layer instead, and each layer in bands of rows: the statistics
stay exact, and only the outputs of the convolutions, and one band of everything else, are in memory.
"""

import copy
import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import resize, short_side_size, sides
from ..vit.devices import is_out_of_memory
from .generator import SLOPE, ConvNorm, Generator, InstanceNorm

log = logging.getLogger(__name__)

WHOLE_PIXELS = 1_500_000
"""Pictures up to this many pixels are rendered in one piece."""

BAND_ROWS = 32
"""Rows of a band: few, so that it stays in a processor's cache."""

NORM_EPS = 1e-5
"""What torch's batch normalisation adds to the variance."""


@torch.no_grad()
def render(
    generator: Generator, picture: Tensor, *, size: int | None = None, whole_pixels: int = WHOLE_PIXELS
) -> Tensor:
    """Applies a generator to pictures of any size.

    At a larger size than it was trained at, a convolutional generator makes halos and colour casts, since its receptive
    field covers smaller parts of the picture. So on larger pictures its output contributes the detail, and its output
    at the size of training the low frequencies.

    Args:
        generator: On the picture's device.
        picture: `[B, 3, H, W]` in 0..1.
        size: Short side in pixels that the generator was trained at; None returns its output as it is.
        whole_pixels: Pictures of more pixels are rendered in bands; the result differs by rounding only.

    Returns:
        `[B, 3, H, W]` in 0..1.
    """
    if picture.shape[-2] * picture.shape[-1] <= whole_pixels:
        output: Tensor = generator(picture)
    else:
        output = torch.cat([_render_in_bands(generator, one) for one in picture.split(1)])
    at = sides(picture)
    if size is None or min(at) <= size:
        return output
    small = short_side_size(*at, size)
    correction = generator(resize(picture, small)) - resize(output, small)
    return output.add_(resize(correction, at)).clamp_(0, 1)


def render_anywhere(generator: Generator, picture: Tensor, *, size: int | None = None) -> Tensor:
    """As `render`; where the picture's device lacks the memory, the CPU renders it."""
    try:
        return render(generator, picture, size=size)
    except (RuntimeError, MemoryError) as error:
        if picture.device.type == "cpu" or not is_out_of_memory(error):
            raise
    # Past the handler, whose traceback holds what the attempt took.
    log.warning("out of memory on %s: the CPU renders the picture", picture.device)
    return render(copy.deepcopy(generator).cpu(), picture.cpu(), size=size).to(picture.device)


class Field(Protocol):
    """A tensor `[1, C, H, W]` that is read in bands of rows."""

    height: int

    def rows(self, top: int, bottom: int) -> Tensor: ...


class Stored:
    """A tensor in memory; where a scale and shift per channel are given, rows get them and a LeakyReLU on reading."""

    def __init__(self, tensor: Tensor, affine: tuple[Tensor, Tensor] | None = None) -> None:
        self.tensor, self.affine = tensor, affine
        self.height = tensor.shape[-2]

    def rows(self, top: int, bottom: int) -> Tensor:
        x = self.tensor[..., top:bottom, :]
        if self.affine is None:
            return x
        scale, shift = self.affine
        return F.leaky_relu_(torch.addcmul(shift, x, scale), SLOPE)


class Merged:
    """A skip, concatenated with the level below at twice its size; rows get scale and shift per channel on reading."""

    def __init__(self, skip: Field, below: Field) -> None:
        self.skip, self.below = skip, below
        self.affine: tuple[Tensor, Tensor] | None = None
        self.height = skip.height

    def rows(self, top: int, bottom: int) -> Tensor:
        skip = self.skip.rows(top, bottom)
        first, last = max(0, top // 2 - 1), min(self.below.height, (bottom + 1) // 2 + 1)
        wide = F.interpolate(self.below.rows(first, last), scale_factor=2, mode="bilinear", align_corners=False)
        offset = top - 2 * first
        x = torch.cat([skip, wide[..., offset : offset + bottom - top, : skip.shape[-1]]], dim=1)
        return x if self.affine is None else torch.addcmul(self.affine[1], x, self.affine[0])


class Moments:
    """Mean and variance per channel, accumulated over bands, in double precision where the device has it."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        # `torch.var_mean` over several axes takes five times as long on CPUs.
        mean = x.mean(dim=(0, 2, 3))
        var = (x - mean.view(1, -1, 1, 1)).square_().mean(dim=(0, 2, 3))
        count = x.numel() // x.shape[1]
        mean, var = (mean.double(), var.double()) if x.device.type != "mps" else (mean, var)
        total = self.count + count
        delta = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + var * count + delta**2 * (self.count * count / total)
        self.mean = self.mean.to(mean) + delta * (count / total)
        self.count = total

    def affine(self, norm: InstanceNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift `[1, C, 1, 1]` that normalise with these moments."""
        scale = norm.weight / (self.squares / self.count + NORM_EPS).sqrt()
        shift = norm.bias - self.mean * scale
        return scale.float().view(1, -1, 1, 1), shift.float().view(1, -1, 1, 1)


def _render_in_bands(generator: Generator, picture: Tensor) -> Tensor:
    """The generator's output for one picture `[1, 3, H, W]`."""

    def level(x: Field, index: int) -> Stored:
        module = generator.level(index)
        skip = _conv_norm(module.skip, x)
        below = _conv_norm(module.deep, _conv_norm(module.down, x))
        if index + 1 < len(generator.levels):
            below = level(below, index + 1)
        merged = Merged(skip, below)
        moments = Moments()
        for top, bottom in _bands(merged.height):
            moments.add(merged.rows(top, bottom))
        merged.affine = moments.affine(module.merge)
        up = _conv_norm(module.up, merged)
        return _conv_norm(module.mix, up, into=up.tensor)

    features = level(Stored(picture), 0)
    output = torch.empty_like(picture)
    for top, bottom in _bands(features.height):
        output[..., top:bottom, :] = torch.sigmoid(generator.output(features.rows(top, bottom)))
    return output


def _bands(height: int) -> list[tuple[int, int]]:
    return [(top, min(top + BAND_ROWS, height)) for top in range(0, height, BAND_ROWS)]


def _conv_norm(module: ConvNorm, x: Field, into: Tensor | None = None) -> Stored:
    """A `ConvNorm` of a field; a 1x1 convolution may write its output `into` the tensor that it reads."""
    conv, moments, out = module.conv, Moments(), into
    pad, stride = conv.kernel_size[0] // 2, conv.stride[0]
    height = (x.height - 1) // stride + 1
    for top, bottom in _bands(height):
        first, last = top * stride - pad, (bottom - 1) * stride + pad + 1
        rows = x.rows(max(0, first), min(x.height, last))
        if pad:
            rows = F.pad(rows, (pad, pad, max(0, -first), max(0, last - x.height)), mode="reflect")
        y = F.conv2d(rows, conv.weight, stride=stride)
        if out is None:
            # In the layout of the convolutions, where a band is one piece of memory.
            shape = (1, y.shape[1], height, y.shape[-1])
            out = torch.empty(shape, device=y.device, memory_format=torch.channels_last)
        out[..., top:bottom, :] = y
        moments.add(y)
    assert out is not None
    return Stored(out, moments.affine(module.norm))
