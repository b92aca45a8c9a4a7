"""Clips: one generator or one instant transfer for all frames of a batch, and how much a result flickers."""

from collections.abc import Callable, Sequence

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from .. import splice_engine as engine
from ..splice_engine import ClipTransfer, InstantSettings, SpliceError, choose_key_frames, measure_flicker
from ..splice_engine.matching.flow import import_opencv
from ..splice_engine.settings import ClipSettings
from ..splice_engine.training.clip import clip_recipe
from ..splice_engine.training.key_frames import candidate_frames
from . import folders
from .convert import ImagePair, check_image, from_image, from_mask, image_dtype, is_empty, to_image
from .memory import MATCH_BYTES, PAINT_BYTES, engine_context, free_for_rendering, load_to_device, recall_backbone
from .progress import Cancellable, Progress, with_progress
from .schema import make_schema
from .training import TrainingNode, train
from .transfer import generator_output
from .widgets import (
    backbone_input,
    backbone_name_widget,
    feather_widget,
    mask_inputs,
    preset_inputs,
    resolve_preset,
    setting_widget,
)

PREVIEW_EVERY = 10
"""Frames between two previews of the result."""


def _clip_inputs() -> list[io.Input]:
    return [
        io.Image.Input("frames", tooltip="The clip whose structure is kept, as from Get Video Components."),
        io.Image.Input("appearance", tooltip="The one picture whose appearance is transferred."),
    ]


class Clip(TrainingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceClip",
            display_name="Splice Clip",
            search_aliases=("video", "style transfer", "frames", "flicker"),
            description="Paints all frames of a clip with the appearance of one picture, by one generator that is "
            "trained on a few key frames, so that nothing flickers.",
            inputs=[
                *_clip_inputs(),
                backbone_name_widget(),
                *preset_inputs(),
                setting_widget("key_frames", ClipSettings),
                *mask_inputs(),
                setting_widget("texture", optional=True),
            ],
            outputs=[
                io.Image.Output("frames", tooltip="The clip in the appearance of the picture, frame by frame."),
                generator_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, backbone_name: str | None = None) -> bool | str:
        return folders.check_name(folders.backbone_source, backbone_name)

    @classmethod
    def execute(
        cls,
        frames,
        appearance,
        backbone_name: str,
        preset: str,
        key_frames: int,
        structure_mask=None,
        appearance_mask=None,
        **changes: float,
    ) -> io.NodeOutput:
        with engine_context():
            settings = resolve_preset(preset, **changes)
            check_image(frames, "clip")
            exemplar = _one_picture(appearance)
            masks = _masks(structure_mask, len(frames))
            usable = [index for index, mask in enumerate(masks) if not is_empty(mask)]
            patchers = [recall_backbone(backbone_name, "auto")]
            (vit,) = load_to_device(patchers)
            candidates = [usable[place] for place in candidate_frames(len(usable))]
            with Cancellable():
                places = choose_key_frames((_frame(frames, index) for index in candidates), vit, key_frames)
            chosen = [candidates[place] for place in places]
            keys, key_masks = [_frame(frames, index) for index in chosen], [masks[index] for index in chosen]
            progress = Progress(clip_recipe(settings, len(keys)).all_steps + len(frames))

            def make_run(_structure, appearance, backbone, settings, objective, generator, structure_mask, **mask):
                return ClipTransfer(
                    keys, appearance, backbone, settings, objective, key_masks, generator=generator, **mask
                )

            b_mask = from_mask(appearance_mask, "appearance mask")
            pair = ImagePair(keys[0], exemplar, key_masks[0], None if b_mask is None else b_mask[:1])
            run, _ = train(pair, patchers, settings, progress, make_run=make_run)
            progress.next(run.steps)
            run.end(run.device)
            free_for_rendering(frames[0, :, :, 0].numel())
            return io.NodeOutput(_paint_frames(frames, masks, run.apply, progress), run.generator.to("cpu"))


class InstantClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceInstantClip",
            display_name="Splice Instant Clip (Style)",
            search_aliases=("video", "style transfer", "frames", "optical flow"),
            description="Paints all frames of a clip with the appearance of one picture, without training: an instant "
            "transfer, carried along the motion.",
            inputs=[
                *_clip_inputs(),
                backbone_input("The ViT whose features tell which part of a frame belongs to which of the picture."),
                setting_widget("texture", InstantSettings),
                feather_widget(),
                *mask_inputs(),
                setting_widget("match_passes", InstantSettings, optional=True),
                setting_widget("density", InstantSettings, optional=True),
            ],
            outputs=[io.Image.Output("frames", tooltip="The clip in the appearance of the picture, frame by frame.")],
        )

    @classmethod
    def execute(
        cls, frames, appearance, backbone, structure_mask=None, appearance_mask=None, **changes: float
    ) -> io.NodeOutput:
        with engine_context():
            settings = InstantSettings(**changes)
            check_image(frames, "clip")
            import_opencv()
            exemplar = _one_picture(appearance)
            masks = _masks(structure_mask, len(frames))
            b_mask = from_mask(appearance_mask, "appearance mask")
            (vit,) = load_to_device([backbone], MATCH_BYTES + PAINT_BYTES * frames[0, :, :, 0].numel())
            clip = engine.InstantClip(exemplar, vit, settings, None if b_mask is None else b_mask[:1])
            return io.NodeOutput(_paint_frames(frames, masks, clip.apply, Progress(len(frames))))


class Flicker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SpliceFlicker",
            display_name="Splice Flicker",
            group="analysis",
            search_aliases=("video", "warping error", "temporal consistency"),
            description="Measures how steadily a clip moves with the one that it was made from.",
            inputs=[
                io.Image.Input("source", tooltip="The clip with the motion."),
                io.Image.Input("result", tooltip="What was made of it, frame by frame."),
            ],
            outputs=[
                io.Float.Output("warping_error", tooltip="Along the source's optical flow; 0 moves as it does."),
                io.Float.Output("flickering", tooltip="1 stands still; only of a source that stands still it tells."),
                io.String.Output("report", tooltip="All of it in words."),
            ],
        )

    @classmethod
    def execute(cls, source, result) -> io.NodeOutput:
        with engine_context():
            for clip, name in ((source, "source"), (result, "result")):
                check_image(clip, name)
            if len(source) != len(result):
                raise SpliceError(f"the source has {len(source)} frames and the result {len(result)}: give equal clips")
            m = measure_flicker((_frame(source, i), _frame(result, i)) for i in with_progress(range(len(source))))
            report = (
                f"warping error {m.warping_error:.4g} (source {m.source_warping_error:.4g}), flickering "
                f"{m.flickering:.4g} (source {m.source_flickering:.4g}), {m.frames} frames"
            )
            return io.NodeOutput(m.warping_error, m.flickering, report)


def _paint_frames(
    frames: Tensor,
    masks: Sequence[Tensor | None],
    apply: Callable[[Tensor, Tensor | None], Tensor],
    progress: Progress,
) -> Tensor:
    """What becomes of each frame and its mask, in order, as an IMAGE.

    A clip may fill much of the memory: there is one copy of it, and it is the result.
    """
    result = torch.empty(*frames.shape[:-1], 3, device=mm.intermediate_device(), dtype=image_dtype())
    for index, into in enumerate(result.split(1)):
        with Cancellable():
            picture = apply(_frame(frames, index), masks[index])
        into.copy_(to_image([picture]))
        progress.next(1, picture if index % PREVIEW_EVERY == 0 else None)
    return result


def _one_picture(appearance: Tensor) -> Tensor:
    """The engine picture of an IMAGE that holds one."""
    exemplar, *more = from_image(appearance, "appearance picture")
    if more:
        raise SpliceError("a clip has one appearance picture: Image From Batch picks one of a batch")
    return exemplar


def _frame(clip: Tensor, index: int) -> Tensor:
    """One frame of an IMAGE as an engine picture."""
    return from_image(clip[index : index + 1], f"frame {index + 1}")[0]


def _masks(mask: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """The engine mask of each frame."""
    masks = from_mask(mask, "structure mask")
    if masks is None:
        return [None] * count
    if len(masks) not in (1, count):
        raise SpliceError(f"{count} frames need 1 or {count} structure masks, not {len(masks)}")
    return list(masks.split(1)) * (count // len(masks))
