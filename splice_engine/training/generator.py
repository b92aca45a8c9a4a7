"""The generator: a small U-Net as in Deep Image Prior (Ulyanov et al., 2018), trained on one pair of pictures."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import SpliceError
from ..files import atomic_path, write_error

CHANNELS = (16, 32, 64, 128, 128)
"""Default width of each level, finest first."""

SKIP_CHANNELS = 4
"""Width of the skip connections."""

INIT_GAIN = 0.02
"""Gain of the initial weights, and deviation of the initial scales."""

SLOPE = 0.2
"""Negative slope of the LeakyReLUs."""

FORMAT = "splice-generator-1"
"""Marks a file as a saved generator."""

FINISHED = "finished"
"""Name of the finished picture in such a file."""


@dataclass(frozen=True)
class Finished:
    """The finished picture of the pair that a generator was trained on.

    What a run lays over its generator's output belongs to that one picture and cannot be made without the pair.

    Attributes:
        structure: Digest of the structure picture, see `digest`.
        picture: `[1, 3, H, W]`, uint8.
    """

    structure: str
    picture: Tensor

    @classmethod
    def of(cls, structure: Tensor, result: Tensor) -> "Finished":
        """Of a structure picture and its result, each `[1, 3, H, W]` in 0..1."""
        return cls(digest(structure), _to_bytes(result))


def digest(picture: Tensor) -> str:
    """The SHA-256 of a picture `[1, 3, H, W]` in 0..1, in 8 bits."""
    values = _to_bytes(picture).contiguous().numpy()
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()


def _to_bytes(picture: Tensor) -> Tensor:
    return picture.detach().cpu().float().clamp(0, 1).mul(255).round().byte()


class InstanceNorm(nn.Module):
    """Instance normalisation with a learnt scale and shift, of `[1, C, H, W]`.

    On a single picture batch statistics are instance statistics, and torch's batch normalisation is faster than its
    instance normalisation and, in the channels-last layout, the correct one of the two.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class ConvNorm(nn.Module):
    """Convolution, instance normalisation, LeakyReLU. A bias would cancel in the normalisation, so there is none."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, padding_mode="reflect")
        if kernel == 1:
            self.conv.padding_mode = "zeros"  # nothing to pad, so that no padding is called
        self.norm = InstanceNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE, inplace=True)


class Level(nn.Module):
    """One level of the U-Net: a narrow skip, the way down to half the size, and the way back up."""

    def __init__(self, inputs: int, outputs: int, below: int) -> None:
        super().__init__()
        self.skip = ConvNorm(inputs, SKIP_CHANNELS, 1)
        self.down = ConvNorm(inputs, outputs, 3, stride=2)
        self.deep = ConvNorm(outputs, outputs, 3)
        self.merge = InstanceNorm(SKIP_CHANNELS + below)
        self.up = ConvNorm(SKIP_CHANNELS + below, outputs, 3)
        self.mix = ConvNorm(outputs, outputs, 1)


class Generator(nn.Module):
    """Maps a picture `[B, 3, H, W]` in 0..1 to one of the same size, each picture normalised by its own statistics.

    Args:
        channels: Width of each level, finest first.
        seed: Of the initial weights (Xavier normal with gain 0.02).
        inputs: Channels of the input; 3 for pictures.

    Attributes:
        metadata: Plain values that `save` writes to the file and `load` reads back.
        finished: The finished picture of its pair, likewise; None where the generator's output is all of it.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, seed: int = 0, inputs: int = 3) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.metadata: dict[str, Any] = {}
        self.finished: Finished | None = None
        # Layers draw weights from the global random state; it is restored, and the weights are replaced below.
        with torch.random.fork_rng(devices=[]):
            above = (inputs, *self.channels[:-1])
            below = (*self.channels[1:], self.channels[-1])
            self.levels = nn.ModuleList(Level(*sizes) for sizes in zip(above, self.channels, below, strict=True))
            self.output = nn.Conv2d(self.channels[0], 3, 1)
        self._initialise(torch.Generator().manual_seed(seed))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, picture: Tensor) -> Tensor:
        if len(picture) > 1:
            return torch.cat([self(one) for one in picture.split(1)])
        x = self._level(picture.contiguous(memory_format=torch.channels_last), 0)
        return torch.sigmoid(self.output(x))

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Writes the weights and the finished picture as safetensors, whole or not at all.

        Args:
            path: Ends in `.safetensors`.
            metadata: Further plain values to keep in the file, such as the size that the generator was trained at.

        Raises:
            SpliceError: The file cannot be written.
        """
        header = {
            "format": FORMAT,
            "channels": json.dumps(self.channels),
            "metadata": json.dumps({**self.metadata, **metadata}),
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        if self.finished is not None:
            header["structure"], tensors[FINISHED] = self.finished.structure, self.finished.picture.contiguous()
        try:
            with atomic_path(Path(path)) as temporary:
                save_file(tensors, temporary, header)
        except (OSError, SafetensorError) as error:
            raise write_error(Path(path), error) from None

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Generator":
        """Reads a generator that `save` wrote.

        Raises:
            SpliceError: The file is missing or holds something else.
        """
        if not Path(path).is_file():
            raise SpliceError(f"no generator at {path}: check the path")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise SpliceError(f"{path} is not a saved generator: choose a file that a transfer has saved")
                generator = cls(tuple(json.loads(header["channels"])))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if FINISHED in tensors:
                    generator.finished = Finished(header["structure"], tensors.pop(FINISHED))
                generator.load_state_dict(tensors)
                generator.metadata = json.loads(header["metadata"])
        except SpliceError:
            raise
        except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
            raise SpliceError(f"{path} cannot be read as a generator ({' '.join(str(error).split())[:160]})") from None
        return generator.to(device)

    def level(self, index: int) -> Level:
        """One level of the U-Net, 0 the finest."""
        module = self.levels[index]
        assert isinstance(module, Level)
        return module

    def _level(self, x: Tensor, index: int) -> Tensor:
        level = self.level(index)
        skip = level.skip(x)
        x = level.deep(level.down(x))
        if index + 1 < len(self.levels):
            x = self._level(x, index + 1)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = x[..., : skip.shape[-2], : skip.shape[-1]]  # of odd sides twice the half is one row or column too many
        x = torch.cat([skip, x], dim=1)
        return level.mix(level.up(level.merge(x)))

    @torch.no_grad()
    def _initialise(self, rng: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                area = module.kernel_size[0] * module.kernel_size[1]
                std = INIT_GAIN * (2 / (area * (module.in_channels + module.out_channels))) ** 0.5
                module.weight.normal_(0, std, generator=rng)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, InstanceNorm):
                module.weight.normal_(1, INIT_GAIN, generator=rng)
