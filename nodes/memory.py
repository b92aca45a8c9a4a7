"""ComfyUI's devices and memory: where engine code runs, how backbones get to the device, and lack of memory."""

import ctypes
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from torch import Tensor, nn

from ..splice_engine import Backbone, Generator, RefinementSettings, Settings, SpliceError
from ..splice_engine.images import sides
from ..splice_engine.matching.descriptors import working_size
from ..splice_engine.settings import VIT_SIZE
from ..splice_engine.training.brightness import DEPTHS
from ..splice_engine.vit import devices
from . import download, folders
from .finish import button

log = logging.getLogger("splice")

AnySettings = TypeVar("AnySettings", Settings, RefinementSettings)

GENERATOR_BYTES = 1600
"""What training the generator takes per pixel of a picture."""

VIT_BYTES = 180
"""What the ViT takes per token, width and block where gradients flow: the most of ViT-S/14, B/14 and B/8, measured."""

CROP_BYTES = 28
"""What a cached crop takes per pixel, with all that belongs to it: the mean over both pictures."""

PASS_BYTES = 80
"""What the ViT takes per token and width where no gradients flow, one block after the other."""

MATCH_BYTES, PAINT_BYTES = 250_000_000, 240
"""What an instant transfer takes: at the working size, whatever the pictures', and per pixel of the result."""

RENDER_BYTES = 400
"""What the generator takes per pixel to render a picture."""

LEAST_SIZE = 128
"""Pixels of the short side below which a run that is out of memory is not shrunk any more."""

NO_MEMORY = "out of memory: use smaller pictures, fewer at a time, or a smaller backbone"

NO_LIGHTER_WAY = "out of memory even in the lightest way: use smaller pictures, a lower `size`, or a smaller backbone"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the engine or ComfyUI, where it has a test of its own (0.8 has none), takes an error for lack of memory.

    ComfyUI's test also clears what CUDA still reports of it.
    """
    host_test = getattr(mm, "is_oom", None)
    return (host_test is not None and host_test(error)) or devices.is_out_of_memory(error)


@contextmanager
def engine_context() -> Iterator[None]:
    """Where engine code runs: gradients are possible, "Finish now" is heard, and a user's mistake is one sentence.

    ComfyUI calls nodes in inference mode, whose tensors can never take part in training, so that whatever enters the
    engine must be copied, built or moved inside this block.

    Raises:
        ValueError: In place of the engine's errors, and for lack of memory.
    """
    context = get_executing_context()
    button.enter(context.node_id if context else None)
    try:
        with torch.inference_mode(False):
            yield
    except SpliceError as error:
        raise ValueError(f"Splice: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        mm.unload_all_models()
        raise ValueError(f"Splice: {NO_MEMORY}") from None
    finally:
        button.leave()


def return_free_heap() -> None:
    """Hands memory of the CPU that is free already back to the system, where the C library has a call for it.

    glibc keeps what is freed, in each thread's heap, as long as anything in use lies above it. Backbones and trainings
    leave hundreds of megabytes so, which neither the host's other models nor other programs could have.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


class BackboneModule(nn.Module):
    """A backbone as ComfyUI's memory management moves it, with room for the attributes that it sets."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone


def load_backbone(name: str, precision: str) -> ModelPatcher:
    """Loads a backbone for ComfyUI to move; call it inside `engine_context`.

    Args:
        name: One of `folders.backbone_names`.
        precision: "auto", "fp32" or "bf16".
    """
    return_free_heap()  # of the backbone before, which nothing holds any more
    device = mm.get_torch_device()
    backbone = download.load(name, devices.pick_dtype(precision, device))
    return ModelPatcher(BackboneModule(backbone), load_device=device, offload_device=mm.unet_offload_device())


_last_backbone: dict[tuple[object, ...], ModelPatcher] = {}


def recall_backbone(name: str, precision: str) -> ModelPatcher:
    """As `load_backbone`, and the last one is kept: a node without a loader does not read it again for each seed."""
    file = Path(folders.backbone_source(name))
    key = (name, precision, file.stat().st_mtime_ns if file.is_file() else None)
    if key not in _last_backbone:
        _last_backbone.clear()
        _last_backbone[key] = load_backbone(name, precision)
    return _last_backbone[key]


def free_for_rendering(pixels: int) -> None:
    """Makes room for rendering a picture: what training has freed, and models that ComfyUI keeps on the device."""
    return_free_heap()
    mm.soft_empty_cache()
    mm.free_memory(RENDER_BYTES * pixels, mm.get_torch_device())


def load_to_device(patchers: Sequence[ModelPatcher], memory: float = 0) -> list[Backbone]:
    """Brings backbones to the device, with so many bytes free beside them; call it inside `engine_context`."""
    mm.load_models_gpu(list(dict.fromkeys(patchers)), memory_required=memory, force_full_load=True)
    for patcher in patchers:
        patcher.model.to(patcher.load_device)  # newer hosts move by themselves only layers that are ComfyUI's own
    return [patcher.model.backbone for patcher in patchers]


def load_beside_sampling(patchers: Sequence[ModelPatcher], memory: float) -> None:
    """Brings models to the device while ComfyUI samples, with so many bytes free beside them; those in use stay.

    Call it inside `engine_context`. Weights that ComfyUI has moved in inference mode meanwhile become usable again.
    """
    if not all(map(_is_ready, patchers)):
        in_use = [model for model in mm.loaded_models(only_currently_used=True) if model is not None]
        with torch.no_grad():
            mm.load_models_gpu([*in_use, *dict.fromkeys(patchers)], memory_required=memory)
            for patcher in patchers:
                patcher.model.to(patcher.load_device)
                if not _is_ready(patcher):
                    patcher.model._apply(torch.clone)


def _is_ready(patcher: ModelPatcher) -> bool:
    """Whether a model is on its device with weights through which gradients flow."""
    return all(
        weight.device.type == patcher.load_device.type and not weight.is_inference()
        for weight in (*patcher.model.parameters(), *patcher.model.buffers())
    )


@contextmanager
def on_device(generator: Generator, memory: float) -> Iterator[torch.device]:
    """Has a generator on the device, with so many bytes free beside it; use it inside `engine_context`."""
    device = mm.get_torch_device()
    mm.free_memory(memory, device)
    try:
        generator.to(device)
        yield device
    finally:
        generator.to("cpu")


def pass_bytes(patcher: ModelPatcher, picture: Tensor, size: int) -> int:
    """About what one picture `[1, 3, H, W]` takes in a pass through a ViT, at a short side of `size` pixels."""
    backbone = patcher.model.backbone
    height, width = backbone.grid_size(*sides(picture), short=size)
    return PASS_BYTES * backbone.width * (height // backbone.patch) * (width // backbone.patch)


def step_bytes(structure: Tensor, patchers: Sequence[ModelPatcher], settings: Settings) -> int:
    """About what a step keeps on the device: two outputs of the generator, two passes through each ViT, all crops."""
    height, width = sides(structure)
    share = min(1.0, (settings.size or height) / min(height, width))
    total = (GENERATOR_BYTES + CROP_BYTES * settings.cached_crops) * height * width * share**2
    for patcher in patchers:
        total += vit_bytes(patcher, structure, settings.vit_size, settings.vit_longest, settings.recompute)
    total *= 2
    if settings.refine_steps:
        refinement = RefinementSettings(recompute=settings.recompute)
        total = max(total, refinement_bytes(structure, patchers[0].model.backbone, refinement))
    return int(total)


def refinement_bytes(structure: Tensor, backbone: Backbone, settings: RefinementSettings) -> float:
    """About what a step of refinement keeps on the device: a pass at its own size, and one at the ViT's."""
    short = min(settings.size, *sides(structure))
    tokens = 0.0
    for size, blocks in ((short, max(DEPTHS) * backbone.depth), (min(VIT_SIZE, short), backbone.depth)):
        height, width = working_size(structure, backbone, max(1, size // backbone.patch))
        tokens += height * width / backbone.patch**2 * (1 if settings.recompute else blocks)
    return VIT_BYTES * tokens * backbone.width


def vit_bytes(patcher: ModelPatcher, picture: Tensor, size: int, longest: int, recompute: bool = False) -> float:
    """About what a pass through a ViT keeps for its gradient, of a picture `[..., H, W]` at a short side of `size`."""
    backbone = patcher.model.backbone
    pixels = size * min(longest, size * max(sides(picture)) / min(sides(picture)))
    return VIT_BYTES * pixels / backbone.patch**2 * backbone.width * (1 if recompute else backbone.depth)


def lighten(settings: AnySettings, short_side: int) -> AnySettings:
    """The next recipe that needs less memory.

    Args:
        settings: The one that needed too much.
        short_side: Of the structure picture, in pixels.

    Raises:
        SpliceError: It is the lightest.
    """
    if not settings.recompute:
        log.warning("Splice: out of memory; starting over with layers computed twice instead of kept")
        return replace(settings, recompute=True)
    size = 3 * min(settings.size or short_side, short_side) // 4
    if size < LEAST_SIZE:
        raise SpliceError(NO_LIGHTER_WAY)
    log.warning("Splice: out of memory; starting over at a short side of %d pixels", size)
    return replace(settings, size=size)
