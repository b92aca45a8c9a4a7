"""Transfers by semantic matching alone: `splice instant`, and `splice interpolate` from one appearance to another."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..clip_writer import check_clip_writable, write_clip
from ..clips import RATE, Frame, NewClip
from ..images import check_writable, save_picture, sides
from ..matching.mixture import InstantMixture
from ..settings import InstantSettings, InterpolationSettings
from .common import (
    add_backbone,
    add_dtype,
    add_output,
    add_quiet,
    add_settings,
    load_backbone,
    load_one,
    recipe_options,
)
from .inputs import add_inputs, add_masks, load_appearance_masks, load_appearances, load_checked_mask, load_inputs


def add_instant(commands: Any) -> None:
    """Adds `splice instant`."""
    parser = commands.add_parser("instant", help="transfer by semantic matching alone, in seconds and without training")
    parser.set_defaults(run=run_instant)
    add_inputs(parser, several=True)
    add_backbone(parser)
    add_dtype(parser)
    add_settings(parser, InstantSettings, "recipe (default in brackets)")


def run_instant(options: argparse.Namespace) -> int:
    """Makes the instant transfer of one or several appearances."""
    settings = InstantSettings(**recipe_options(InstantSettings, options))
    check_writable(options.output, options.overwrite)
    inputs = load_inputs(options)
    instant = InstantMixture.between(
        inputs.structure,
        inputs.appearances,
        load_backbone(options),
        inputs.weights,
        settings,
        inputs.structure_mask,
        inputs.appearance_masks,
    )
    save_picture(instant.image(), options.output, inputs.alpha, overwrite=options.overwrite)
    print(options.output)
    return 0


def add_interpolate(commands: Any) -> None:
    """Adds `splice interpolate`."""
    parser = commands.add_parser("interpolate", help="frames from one appearance to another, without training")
    parser.set_defaults(run=run_interpolate)
    parser.add_argument("structure", type=Path, help="picture whose structure is kept")
    parser.add_argument("first", type=Path, help="picture whose appearance the first frame has")
    parser.add_argument("last", type=Path, help="picture whose appearance the last frame has")
    add_output(parser)
    add_masks(parser, several=True)
    add_quiet(parser)
    add_backbone(parser)
    add_dtype(parser)
    add_settings(parser, InterpolationSettings, "recipe (default in brackets)")


def run_interpolate(options: argparse.Namespace) -> int:
    """Writes the instant transfers on the way from one appearance to another, as a video or into a folder."""
    settings = InterpolationSettings(**recipe_options(InterpolationSettings, options))
    options.appearance = [options.first, options.last]
    structure = load_one(options.structure, "structure picture")
    clip = NewClip(sides(structure))
    check_clip_writable(options.output, clip, options.overwrite)
    appearances, masks = load_appearances(options.appearance), load_appearance_masks(options)
    mask = None if options.structure_mask is None else load_checked_mask(options.structure_mask)
    mixture = InstantMixture.between(
        structure,
        appearances,
        load_backbone(options),
        settings=settings,
        structure_mask=mask,
        appearance_masks=masks,
    )
    count = settings.frames
    with write_clip(options.output, clip, options.overwrite) as write:
        frames = tqdm(mixture.frames(count), "frames", total=count, disable=options.quiet, unit="frame")
        for index, picture in enumerate(frames):
            write(picture, Frame(picture, index / RATE, f"frame_{index + 1:05d}"))
    print(options.output)
    return 0
