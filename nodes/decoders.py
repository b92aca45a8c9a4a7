"""What makes a picture of a latent while ComfyUI samples: latent colours, a TAESD, or a VAE.

Each is a module whose `decode` takes a latent in the model's own space. ComfyUI loads VAEs in inference mode, in which
no gradient can flow through their weights: so a decoder has its own copy of them, made inside `memory.engine_context`.
"""

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taesd import TAESD
from torch import Tensor, nn

from ..splice_engine import SpliceError

COLOURS, TAESD_NAME, VAE_NAME = "latent colours", "TAESD", "VAE"
DECODERS = ("auto", COLOURS, TAESD_NAME, VAE_NAME)
"""What the widget offers; auto is a VAE that is connected, else a TAESD whose file is there, else latent colours."""

SAVED_BYTES = {COLOURS: 100, TAESD_NAME: 5_000, VAE_NAME: 25_000}
"""What a pass through a decoder and back takes per decoded pixel, that of a VAE of Stable Diffusion, measured."""


class LatentDecoder(nn.Module):
    """A decoder as ComfyUI's memory management moves it.

    Args:
        name: One of `DECODERS`.
        decode: A function of a latent `[1, C, h, w]` to a picture `[1, 3, H, W]` in -1..1.
        parts: The modules that it uses.
        channels: C.

    Attributes:
        scale: Pixels per cell of the latent and axis.
    """

    def __init__(self, name: str, decode: Callable[[Tensor], Tensor], parts: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.name = name
        self.parts = nn.ModuleList(parts).float().eval().requires_grad_(False)
        self._decode = decode
        with torch.no_grad():
            self.scale = self(torch.zeros(1, channels, 4, 4)).shape[-1] // 4

    def forward(self, latent: Tensor) -> Tensor:
        """A picture `[1, 3, H, W]` in 0..1, not clamped: a pixel that is clamped has no gradient."""
        mm.throw_exception_if_processing_interrupted()
        return self._decode(latent)[:, :3] / 2 + 0.5

    def saved_bytes(self, latent: Tensor, size: int) -> float:
        """About what decoding a latent `[..., h, w]` at a short side of at most `size` pixels takes."""
        height, width = self.scale * latent.shape[-2], self.scale * latent.shape[-1]
        share = min(1.0, size / min(height, width))
        return SAVED_BYTES[self.name] * height * width * share**2


class _LinearMap(nn.Module):
    """A linear map of channels, whose weights move with the module that it is part of."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias)


def list_decoders(choice: str, latent_format: Any, vae: Any = None) -> list[Callable[[], ModelPatcher]]:
    """What builds the chosen decoder, and then each lighter one that there is for the model.

    Args:
        choice: One of `DECODERS`.
        latent_format: The model's.
        vae: ComfyUI's `VAE`, where one is connected.

    Raises:
        SpliceError: The model does not have the chosen one, or the VAE is not the model's.
    """
    taesd = find_taesd(latent_format)
    ways: dict[str, Callable[[], ModelPatcher]] = {}
    if vae is not None:
        check_vae(vae, latent_format)
        ways[VAE_NAME] = lambda: make_vae(vae, latent_format)
    if taesd is not None:
        ways[TAESD_NAME] = lambda: make_taesd(taesd, latent_format)
    if latent_format.latent_rgb_factors is not None:
        ways[COLOURS] = lambda: make_colours(latent_format)
    names = list(ways)
    if not names:
        raise SpliceError("ComfyUI knows no latent colours of this model: connect its VAE")
    if choice not in ("auto", *names):
        file = latent_format.taesd_decoder_name
        raise SpliceError(
            {
                VAE_NAME: "the decoder is to be a VAE, but none is connected: connect the model's",
                COLOURS: "ComfyUI knows no latent colours of this model: choose another decoder",
                TAESD_NAME: f"there is no {file} in models/vae_approx: put its file there, or choose another decoder"
                if file
                else "there is no TAESD for this model: choose another decoder",
            }[choice]
        )
    first = 0 if choice == "auto" else names.index(choice)
    return [ways[name] for name in names[first:]]


def find_taesd(latent_format: Any) -> str | None:
    """The file of the model's TAESD in `models/vae_approx`, as ComfyUI's previews find it; None: there is none."""
    name = latent_format.taesd_decoder_name
    if name is None or latent_format.latent_dimensions != 2:  # those of videos are other networks
        return None
    files = (file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name))
    file = next(files, None)
    return None if file is None else folder_paths.get_full_path("vae_approx", file)


def check_vae(vae: Any, latent_format: Any) -> None:
    """Checks that a VAE may be the model's.

    Raises:
        SpliceError: It has no weights, or latents of another number of channels.
    """
    if vae.first_stage_model is None:
        raise SpliceError("the VAE has no weights: load one with Load VAE")
    if vae.latent_channels != latent_format.latent_channels:
        raise SpliceError(
            f"the VAE decodes latents of {vae.latent_channels} channels, but those of the model have "
            f"{latent_format.latent_channels}: connect the model's own VAE"
        )


def make_colours(latent_format: Any) -> ModelPatcher:
    """The linear map from latents to colours that ComfyUI's previews use."""
    weight = torch.tensor(latent_format.latent_rgb_factors).T[:, :, None, None]
    colours = _LinearMap(weight, torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0]))
    reshape = latent_format.latent_rgb_factors_reshape
    decode = colours if reshape is None else lambda latent: colours(reshape(latent))
    return _patch(LatentDecoder(COLOURS, decode, [colours], latent_format.latent_channels))


def make_taesd(path: str, latent_format: Any) -> ModelPatcher:
    """The small network that ComfyUI's previews use.

    Raises:
        SpliceError: The file cannot be read as one.
    """
    try:
        taesd = TAESD(None, path, latent_channels=latent_format.latent_channels)
    except Exception as error:  # of many classes, by what the file holds
        raise SpliceError(f"{path} cannot be read as a TAESD ({type(error).__name__}): fetch it again") from None
    return _patch(LatentDecoder(TAESD_NAME, taesd.decode, [taesd], latent_format.latent_channels))


def make_vae(vae: Any, latent_format: Any) -> ModelPatcher:
    """A copy of a VAE's decoder, in fp32: in half precision small gradients vanish."""
    model = copy.deepcopy(vae.first_stage_model)
    if hasattr(model, "encoder"):
        del model.encoder
    ends_in_unit_range = vae.process_output(torch.full((1, 3, 1, 1), 0.5)).eq(0.5).all()

    def decode(latent: Tensor) -> Tensor:
        """Where the model or the VAE knows clips, a picture is one of one frame."""
        clips = latent_format.latent_dimensions == 3
        latent = latent_format.process_out(latent[:, :, None])[:, :, 0] if clips else latent_format.process_out(latent)
        picture = model.decode(latent[:, :, None])[:, :, 0] if vae.latent_dim == 3 else model.decode(latent)
        return picture * 2 - 1 if ends_in_unit_range else picture

    return _patch(LatentDecoder(VAE_NAME, decode, [model], latent_format.latent_channels))


def _patch(module: LatentDecoder) -> ModelPatcher:
    return ModelPatcher(module, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
