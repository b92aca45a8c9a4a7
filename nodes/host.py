"""Everything that ComfyUI gives: device and memory, progress and interruption, folders, its pictures and masks."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import comfy.model_management as mm
import folder_paths
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor, nn

from ..splice_engine import (
    CATALOGUE,
    Backbone,
    Features,
    Generator,
    Inversion,
    Objective,
    Settings,
    SpliceError,
    Term,
    Transfer,
    render,
)
from ..splice_engine.devices import is_out_of_memory, pick_dtype
from ..splice_engine.images import check_picture, sides, to_pil
from ..splice_engine.objective import PictureTerm
from ..splice_engine.transfer import recipe_terms
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

GENERATOR_BYTES, VIT_BYTES, RENDER_BYTES, VIEW_BYTES = 1600, 180, 400, 28
"""What one picture takes: of the generator's training per pixel; of the ViT's per token, width and block, where
gradients flow (most, measured over ViT-S/14, B/14 and B/8); of rendering per pixel; of a view that recurs per pixel,
with what belongs to it, the mean over both pictures."""

LEAST_SIZE = 128
"""Pixels of the short side below which a run that is out of memory is not shrunk any more."""

NO_MEMORY = "out of memory even in the lightest way: use smaller pictures, a lower `size`, or a smaller backbone"

finish_early = threading.Event()
"""Set to end the run under way after its current step and to keep its picture."""

Run = TypeVar("Run", Transfer, Inversion)


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


def found_by(*words: str) -> dict[str, list[str]]:
    """What a `Schema` takes to be found by other words than its name, where ComfyUI knows of that (0.8 does not)."""
    known = any(field.name == "search_aliases" for field in fields(io.Schema))
    return {"search_aliases": list(words)} if known else {}


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


def selection(mask: Tensor | None) -> Tensor | None:
    """A MASK `[B, h, w]` as engine masks `[B, 1, h, w]`, copied; call it while `working`.

    An all-zero one is none: `LoadImage` gives such, of 64x64 pixels, for every picture without transparency.
    """
    return None if mask is None or not mask.any() else mask[:, None].to("cpu", torch.float32, copy=True)


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


def mask(results: Tensor) -> Tensor:
    """Engine masks `[B, 1, H, W]` as a MASK."""
    return results[:, 0].detach().clamp(0, 1).to(mm.intermediate_device())


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
        _for_each([None] if mask is None else list(mask.split(1)), len(a), f"{what} masks")
        for what, mask in (("structure", structure_mask), ("appearance", appearance_mask))
    )
    return [
        Pair(*both, *(selection(mask) for mask in masks))
        for both, masks in zip(zip(a, b, strict=True), zip(a_masks, b_masks, strict=True), strict=True)
    ]


def _for_each(given: list, count: int, what: str) -> list:
    if len(given) not in (1, count):
        raise SpliceError(f"{count} structure pictures need 1 or {count} {what}, not {len(given)}")
    return given * (count // len(given))


class Progress:
    """A node's progress bar over the steps of all its runs, which take place one after the other."""

    def __init__(self, steps: int) -> None:
        self._bar, self._steps, self._before = ProgressBar(steps), steps, 0

    def show(self, step: int, preview: Tensor | None = None) -> None:
        """Tells how many steps of the run under way are done, and its picture so far `[1, 3, H, W]`."""
        glimpse = None if preview is None else to_pil(preview)
        self._bar.update_absolute(self._before + step, self._steps, glimpse and ("JPEG", glimpse, max(glimpse.size)))

    def next(self, steps: int) -> None:
        """Counts a run of so many steps as done."""
        self._before += steps
        self.show(0)


def train(
    pair: Pair,
    patchers: Sequence[ModelPatcher],
    settings: Settings,
    progress: Progress,
    terms: Sequence[Term] = (),
    start: Generator | None = None,
) -> tuple[Transfer, list[dict[str, float]]]:
    """A whole run, `watched`; in lighter ways where memory does not suffice.

    Args:
        pair: What it works on.
        patchers: The backbones that take part, that of the run first.
        settings: The recipe.
        progress: The node's.
        terms: Of an objective that takes the place of the recipe's own terms between what a ViT sees. Those between
            pixels stay.
        start: The generator from a copy of which training sets out.

    Returns:
        The run, and the losses of its steps: fewer than planned where `finish_early` was set.

    Raises:
        SpliceError: The run's own, or not even the lightest way had enough memory.
    """
    if terms:
        terms = [*terms, *(term for term in recipe_terms(settings) if isinstance(term, PictureTerm))]
    while True:
        judge, *_ = place(patchers, step_bytes(pair.structure, patchers, settings))
        objective = (
            Objective(terms, judge, settings.vit_size, settings.vit_longest, settings.recompute) if terms else None
        )
        try:
            return watched(
                Transfer(pair.structure, pair.appearance, judge, settings, objective, generator=start, **pair.masks),
                progress,
            )
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


def watched(run: Run, progress: Progress) -> tuple[Run, list[dict[str, float]]]:
    """Takes a run to its end with progress, live preview and interruption.

    Returns:
        The run, and the losses of its steps: fewer than planned where `finish_early` was set.
    """
    steps = []
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
                progress.show(run.step, run.image(preview))
                told = shown = time.monotonic()
                spent += shown - now
            elif now - told >= PROGRESS_SECONDS:
                progress.show(run.step)
                told = now
            if finish_early.is_set():
                log.info("Splice: finished early, after %d of %d steps", run.step, run.steps)
                break
        progress.next(run.steps)
        return run, [step.floats() for step in steps]
    finally:
        del run  # an exception on its way keeps this frame, which must not keep the run's memory


def step_bytes(structure: Tensor, patchers: Sequence[ModelPatcher], settings: Settings) -> int:
    """About what a step keeps on the device: two outputs of the generator, two passes through each ViT, all views."""
    height, width = sides(structure)
    share = min(1.0, (settings.size or height) / min(height, width))
    total = (GENERATOR_BYTES + VIEW_BYTES * settings.views) * height * width * share**2
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
