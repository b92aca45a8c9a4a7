"""The commands for clips: `splice clip` and `splice flicker`."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..analysis.flicker import measure_flicker
from ..clip_writer import check_clip_writable, write_clip
from ..clips import Clip, Frame, open_clip, open_masks
from ..errors import SpliceError
from ..files import check_place
from ..images import LEAST_MASK, check_mask, load_mask
from ..matching.carried import InstantClip
from ..matching.flow import import_opencv
from ..presets import DEFAULT_PRESET, PRESETS, preset
from ..settings import ClipSettings, Settings
from ..training.clip import ClipTransfer
from ..training.key_frames import candidate_frames, choose_key_frames
from ..vit.backbone import Backbone
from .common import (
    OPAQUE,
    add_backbone,
    add_dtype,
    add_output,
    add_quiet,
    add_settings,
    iterate_with_bar,
    load_backbone,
    load_one,
    print_values,
    recipe_options,
)
from .outputs import Outputs, check_distinct, report_end


def add_clip(commands: Any) -> None:
    """Adds `splice clip`."""
    parser = commands.add_parser("clip", help="give all frames of a clip the appearance of one picture")
    parser.set_defaults(run=run_clip)
    parser.add_argument("clip", type=Path, help="a video, or a folder of frames, whose structure is kept")
    parser.add_argument("appearance", type=Path, help="picture whose appearance is transferred")
    add_output(parser)
    parser.add_argument(
        "--structure-mask",
        type=Path,
        metavar="PATH",
        help="white where the frames may change: a folder or a video of a mask for each, or one picture for all; a "
        "frame whose mask is empty stays as it is",
    )
    parser.add_argument(
        "--appearance-mask", type=Path, metavar="FILE", help=f"white where the appearance is taken from; {OPAQUE}"
    )
    add_backbone(parser)
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=PRESETS, help="the recipe (default: %(default)s)")
    parser.add_argument(
        "--instant",
        action="store_true",
        help="no training: the instant transfer of the first frame, carried along the motion; sharper, and less steady",
    )
    add_dtype(parser)
    parser.add_argument(
        "--save-generator", type=Path, metavar="FILE", help="keep the trained generator, as .safetensors"
    )
    add_quiet(parser)
    add_settings(parser, ClipSettings, "clip (default in brackets)")
    add_settings(parser, Settings)


def run_clip(options: argparse.Namespace) -> int:
    """Trains on the key frames of a clip, and writes all of its frames."""
    settings = preset(options.preset, **recipe_options(Settings, options))
    of_clip = ClipSettings(**recipe_options(ClipSettings, options))
    clip = open_clip(options.clip)
    if len(clip) == 1:
        raise SpliceError(f"{options.clip} has one frame: `splice transfer` is for a single picture")
    check_clip_writable(options.output, clip, options.overwrite)
    if options.save_generator:
        check_place(options.save_generator, options.overwrite)
        check_distinct([options.output, options.save_generator])
    appearance = load_one(options.appearance, "appearance picture")
    mask = options.appearance_mask
    appearance_mask = None if mask is None else check_mask(load_mask(mask), f"mask {mask}")
    if options.instant:
        if options.save_generator:
            raise SpliceError("--instant trains no generator to save: leave out one of the two")
        import_opencv()
        instant = InstantClip(appearance, load_backbone(options), settings, appearance_mask)
        _write_frames(clip, options, instant.apply)
        print(options.output)
        return 0
    backbone = load_backbone(options)
    started = time.monotonic()
    frames, masks = _gather_key_frames(clip, options.structure_mask, backbone, of_clip.key_frames)
    run = ClipTransfer(frames, appearance, backbone, settings, masks=masks, appearance_mask=appearance_mask)
    for _ in iterate_with_bar(run, options.quiet):
        pass
    run.end(run.device)
    _write_frames(clip, options, run.apply)
    outputs = Outputs()
    outputs.written.append(options.output)
    outputs.write(options.save_generator, run.generator.save)
    outputs.check()
    return report_end(run.step, run.steps, time.monotonic() - started, outputs.written)


def _write_frames(clip: Clip, options: argparse.Namespace, apply: Callable[[Tensor, Tensor | None], Tensor]) -> None:
    """Writes what becomes of each frame and its mask."""
    with write_clip(options.output, clip, options.overwrite) as write:
        masked = tqdm(
            _with_masks(clip, options.structure_mask), "frames", total=len(clip), disable=options.quiet, unit="frame"
        )
        for frame, mask in masked:
            write(apply(frame.picture, mask), frame)


def add_flicker(commands: Any) -> None:
    """Adds `splice flicker`."""
    parser = commands.add_parser("flicker", help="measure how steadily a clip moves with the clip it was made from")
    parser.set_defaults(run=run_flicker)
    parser.add_argument("source", type=Path, help="the clip with the motion: a video, or a folder of frames")
    parser.add_argument("result", type=Path, help="what was made of it, likewise")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    add_quiet(parser)


def run_flicker(options: argparse.Namespace) -> int:
    """Prints how much a clip flickers."""
    import_opencv()
    source, result = (open_clip(path) for path in (options.source, options.result))
    if len(source) != len(result):
        raise SpliceError(
            f"{options.source} has {len(source)} frames and {options.result} {len(result)}: give two clips, frame by "
            "frame the same"
        )
    pairs = ((ours.picture, theirs.picture) for ours, theirs in zip(source, result, strict=True))
    with tqdm(pairs, "frames", total=len(source), disable=options.quiet, unit="frame") as bar:
        values = dataclasses.asdict(measure_flicker(bar))
    print_values(values, options.json)
    return 0


def _with_masks(clip: Clip, path: Path | None) -> Iterator[tuple[Frame, Tensor | None]]:
    """The frames, each with its mask."""
    masks = None if path is None else open_masks(path, clip)
    for frame in clip:
        yield frame, None if masks is None else next(masks)


def _gather_key_frames(
    clip: Clip, masks: Path | None, backbone: Backbone, most: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The key frames with their masks, among the frames that may change."""
    usable = list(range(len(clip)))
    if masks is not None:
        selects = [bool(mask.max() >= LEAST_MASK) for mask in open_masks(masks, clip)]
        usable = [index for index in usable if selects[index]]
        if not usable:
            raise SpliceError(f"{masks} selects nothing in any frame: make what it should select white")
    candidates = [usable[place] for place in candidate_frames(len(usable))]
    compared = (frame.picture for index, frame in enumerate(clip) if index in candidates)
    places = choose_key_frames(compared, backbone, most)
    chosen = {candidates[place] for place in places}
    pairs = [pair for index, pair in enumerate(_with_masks(clip, masks)) if index in chosen]
    return [frame.picture for frame, _ in pairs], [mask for _, mask in pairs]
