"""Everything that ComfyUI gives: device and memory, progress and interruption, folders, its pictures and masks."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import comfy.model_management as mm
import folder_paths
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from server import PromptServer
from torch import Tensor, nn

from ..splice_engine import (
    CATALOGUE,
    Backbone,
    Features,
    Generator,
    Objective,
    Settings,
    SpliceError,
    Term,
    Transfer,
    render,
)
from ..splice_engine.devices import is_out_of_memory, pick_dtype
from ..splice_engine.images import check_picture, sides, to_pil
from ..splice_engine.weights import SUFFIXES

CATEGORY = "Splice"
"""Where all nodes are in ComfyUI's menu."""

log = logging.getLogger("splice")

BACKBONES, GENERATORS = "dino", "splice_generators"
"""Folders in ComfyUI's `models`."""

PREVIEW_SIZE = 256
PREVIEW_SECONDS = 0.5
PREVIEW_SHARE = 0.02
"""Short side of a live preview; least time between two; most of a run's time that they may take."""

PROGRESS_SECONDS = 0.1

GENERATOR_BYTES, VIT_BYTES, RENDER_BYTES = 1600, 180, 400
"""What one picture takes: of the generator's training per pixel; of the ViT's per token, width and block, where
gradients flow (most, measured over ViT-S/14, B/14 and B/8); of rendering per pixel."""

LEAST_SIZE = 128
"""Pixels of the short side below which a run that is out of memory is not shrunk any more."""

NO_MEMORY = "out of memory even in the lightest way: use smaller pictures, a lower `size`, or a smaller backbone"

finish_early = threading.Event()
"""Set to end the run under way after its current step and to keep its picture."""


def register_folders() -> None:
    """Makes ComfyUI know the folders of backbones and of generators."""
    for name, suffixes in ((BACKBONES, set(SUFFIXES)), (GENERATORS, {".safetensors"})):
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        paths, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(known) | suffixes)


def register_routes() -> None:
    """What the button "Finish now" calls."""

    @PromptServer.instance.routes.post("/splice/finish")
    async def finish(_request: web.Request) -> web.Response:
        finish_early.set()
        return web.Response()


def backbone_names() -> list[str]:
    """The catalogue, then the files in `models/dino`."""
    return [*CATALOGUE, *folder_paths.get_filename_list(BACKBONES)]


@contextmanager
def working() -> Iterator[None]:
    """Where engine code runs: gradients are possible, and a user's mistake is one sentence.

    ComfyUI calls nodes in inference mode, whose tensors can never take part in training, so that whatever enters the
    engine must be copied, built or moved inside this block.
    """
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


class Cargo(nn.Module):
    """A backbone as ComfyUI's memory management moves it, with room for the attributes that it sets."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone


def load_backbone(name: str, precision: str) -> ModelPatcher:
    """Loads a backbone of `backbone_names()` for ComfyUI to place; call it while `working`.

    Args:
        name: From the catalogue, or a file in `models/dino`.
        precision: "auto", "fp32" or "bf16".
    """
    device = mm.get_torch_device()
    source = name if name in CATALOGUE else folder_paths.get_full_path_or_raise(BACKBONES, name)
    dtype = pick_dtype(precision, device)
    backbone = Backbone.load(source, dtype=dtype, folders=folder_paths.get_folder_paths(BACKBONES))
    return ModelPatcher(Cargo(backbone), load_device=device, offload_device=mm.unet_offload_device())


def place(patchers: Sequence[ModelPatcher], memory: float = 0) -> list[Backbone]:
    """Brings backbones to the device, with so many bytes free beside them; call it while `working`."""
    mm.load_models_gpu(list(dict.fromkeys(patchers)), memory_required=memory, force_full_load=True)
    return [patcher.model.backbone for patcher in patchers]


def pictures(image: Tensor, what: str) -> list[Tensor]:
    """An IMAGE `[B, H, W, C]` as engine pictures `[1, 3, H, W]`, checked and copied; call it while `working`.

    Grey becomes RGB and transparency is dropped, as ComfyUI's own nodes do.
    """
    if not len(image):
        raise SpliceError(f"the {what} is an empty batch: mend the node that made it")
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)
    copies = image.movedim(-1, 1).to("cpu", torch.float32, copy=True).contiguous()
    return [check_picture(picture, what) for picture in copies.split(1)]


def kept(features: Features) -> Features:
    """Features where ComfyUI keeps what passes between nodes."""
    device = mm.intermediate_device()
    return replace(
        features,
        cls=features.cls.to(device),
        tokens=features.tokens.to(device),
        prefix=features.prefix.to(device),
    )


def image(results: Sequence[Tensor]) -> Tensor:
    """Engine pictures `[1, 3, H, W]` of one size as an IMAGE."""
    return torch.cat(list(results)).detach().clamp(0, 1).movedim(1, -1).to(mm.intermediate_device())


@dataclass(frozen=True)
class Pair:
    """What one run works on: engine pictures `[1, 3, H, W]`, and engine masks `[1, 1, H, W]` of any sizes or None."""

    structure: Tensor
    appearance: Tensor
    structure_mask: Tensor | None
    appearance_mask: Tensor | None

    @property
    def masks(self) -> dict[str, Tensor | None]:
        """The masks by the engine's names."""
        return {"structure_mask": self.structure_mask, "appearance_mask": self.appearance_mask}


def pairs(
    structure: Tensor,
    appearance: Tensor,
    structure_mask: Tensor | None = None,
    appearance_mask: Tensor | None = None,
) -> list[Pair]:
    """Two IMAGEs and their MASKs as pairs, copied; call it while `working`.

    There is one pair for each structure picture; all else may hold one for all or as many.
    """
    a = pictures(structure, "structure picture")
    b = _for_each(pictures(appearance, "appearance picture"), len(a), "appearance pictures")
    a_masks, b_masks = (
        _for_each([None] if mask is None else list(mask), len(a), f"{what} masks")
        for what, mask in (("structure", structure_mask), ("appearance", appearance_mask))
    )
    return [
        Pair(*both, *(_mask(mask) for mask in masks))
        for both, masks in zip(zip(a, b, strict=True), zip(a_masks, b_masks, strict=True), strict=True)
    ]


def _for_each(given: list, count: int, what: str) -> list:
    if len(given) not in (1, count):
        raise SpliceError(f"{count} structure pictures need 1 or {count} {what}, not {len(given)}")
    return given * (count // len(given))


def _mask(given: Tensor | None) -> Tensor | None:
    """A mask `[h, w]` as an engine mask `[1, 1, h, w]`, copied.

    An all-zero one is none: `LoadImage` gives such, of 64x64 pixels, for every picture without transparency.
    """
    return None if given is None or not given.any() else given[None, None].to("cpu", torch.float32, copy=True)


def train(
    pair: Pair, patchers: Sequence[ModelPatcher], settings: Settings, terms: Sequence[Term] = ()
) -> tuple[Transfer, list[dict[str, float]]]:
    """A whole run with progress, live preview and interruption; in lighter ways where memory does not suffice.

    Args:
        pair: What it works on.
        patchers: The backbones that take part, that of the run first.
        settings: The recipe.
        terms: Of an objective that replaces the recipe's own.

    Returns:
        The run, and the losses of its steps: fewer than planned where `finish_early` was set.

    Raises:
        SpliceError: The run's own, or not even the lightest way had enough memory.
    """
    while True:
        judge, *_ = place(patchers, _step_bytes(pair.structure, patchers, settings))
        objective = (
            Objective(terms, judge, settings.vit_size, settings.vit_longest, settings.recompute) if terms else None
        )
        try:
            return _train(Transfer(pair.structure, pair.appearance, judge, settings, objective, **pair.masks))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here, past the handler whose traceback holds the run, can its memory be freed.
        mm.soft_empty_cache()
        settings = _lighter(settings, min(sides(pair.structure)))


def apply(generator: Generator, originals: Sequence[Tensor]) -> list[Tensor]:
    """The generator's outputs for engine pictures, all on the CPU; call it while `working`."""
    device, bar = mm.get_torch_device(), ProgressBar(len(originals))
    mm.free_memory(RENDER_BYTES * originals[0][0, 0].numel(), device)
    results, size = [], generator.metadata.get("size")
    try:
        generator.to(device)
        for picture in originals:
            results.append(render(generator, picture.to(device), size=size).cpu())
            bar.update(1)
        return results
    finally:
        generator.to("cpu")


def _train(run: Transfer) -> tuple[Transfer, list[dict[str, float]]]:
    bar, steps = ProgressBar(run.steps), []
    preview = min(PREVIEW_SIZE, *sides(run.picture))
    started = shown = told = time.monotonic()
    spent = 0.0
    finish_early.clear()
    try:
        for step in run:
            mm.throw_exception_if_processing_interrupted()
            steps.append(step)
            now = time.monotonic()
            if now - shown >= PREVIEW_SECONDS and spent <= PREVIEW_SHARE * (now - started):
                glimpse = to_pil(run.image(preview))
                bar.update_absolute(run.step, run.steps, ("JPEG", glimpse, max(glimpse.size)))
                told = shown = time.monotonic()
                spent += shown - now
            elif now - told >= PROGRESS_SECONDS:
                bar.update_absolute(run.step, run.steps)
                told = now
            if finish_early.is_set():
                log.info("Splice: finished early, after %d of %d steps", run.step, run.steps)
                break
        return run, [step.floats() for step in steps]
    finally:
        del run  # an exception on its way keeps this frame, which must not keep the run's memory


def _step_bytes(structure: Tensor, patchers: Sequence[ModelPatcher], settings: Settings) -> int:
    """About what a step keeps on the device: two outputs of the generator, and two passes through each ViT."""
    height, width = sides(structure)
    share = min(1.0, (settings.size or height) / min(height, width))
    total = GENERATOR_BYTES * height * width * share**2
    for backbone in (patcher.model.backbone for patcher in patchers):
        seen = settings.vit_size * min(
            settings.vit_longest, settings.vit_size * max(height, width) / min(height, width)
        )
        depth = 1 if settings.recompute else backbone.depth
        total += VIT_BYTES * seen / backbone.patch**2 * backbone.width * depth
    return int(2 * total)


def _lighter(settings: Settings, short_side: int) -> Settings:
    """The next recipe that needs less memory."""
    if not settings.recompute:
        log.warning("Splice: out of memory; starting over with layers computed twice instead of kept")
        return replace(settings, recompute=True)
    size = 3 * min(settings.size or short_side, short_side) // 4
    if size < LEAST_SIZE:
        raise SpliceError(NO_MEMORY)
    log.warning("Splice: out of memory; starting over at a short side of %d pixels", size)
    return replace(settings, size=size)
