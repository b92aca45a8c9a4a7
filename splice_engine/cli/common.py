"""Shared by the commands: options, interruption, and what they print."""

import argparse
import dataclasses
import io
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from torch import Tensor
from tqdm import tqdm

from ..images import check_picture, load_picture
from ..recipe import Recipe
from ..training.run import Run, Step
from ..vit.backbone import Backbone
from ..vit.catalogue import DEFAULT_BACKBONE
from ..vit.devices import DTYPES, pick_device, pick_dtype
from .weights import download_bar

OPAQUE = "of a picture with transparency, the opaque part"
"""Help of a mask."""

PRESET_DEFAULTS = "recipe (default: the preset's own number; in brackets that of `paper`)"
"""Title of the options of a recipe that has presets."""


class Remarks(logging.Handler):
    """Prints what the engine logs as lines on stderr, beside a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"splice: {record.getMessage()}", file=sys.stderr)


REMARKS = Remarks()


def prepare_console() -> None:
    """Has the engine's remarks printed, and characters replaced that the console's encoding lacks."""
    logging.getLogger("splice_engine").addHandler(REMARKS)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


class Interruption:
    """Whether the user wants the run to stop."""

    is_set = False


@contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Turns the first Ctrl-C into a request to stop after the current step; a second one stops at once."""
    interruption = Interruption()

    def request(_signal: int, _frame: FrameType | None) -> None:
        interruption.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


def iterate_with_bar(run: Run, quiet: bool, name: str | None = None) -> Iterator[Step]:
    """Yields the steps of a run beside a progress bar, to its end or to the first Ctrl-C.

    Args:
        run: What is trained.
        quiet: Shows no bar.
        name: Stands before the bar.
    """
    with (
        catch_interruption() as interruption,
        tqdm(run, name, total=run.steps_left, unit="step", disable=quiet, mininterval=0.5, dynamic_ncols=True) as bar,
    ):
        shown = -math.inf
        for step in bar:
            if time.monotonic() - shown > 1:  # reading the losses waits for the device
                bar.set_postfix({name: f"{value:.3g}" for name, value in step.floats().items()}, refresh=False)
                shown = time.monotonic()
            yield step
            if interruption.is_set:
                return


def load_backbone(options: argparse.Namespace) -> Backbone:
    """Loads the backbone that the options name, onto their device."""
    device = pick_device(options.device)
    with download_bar() as progress:
        return Backbone.load(options.backbone, device, pick_dtype(options.dtype, device), progress=progress)


def print_values(values: Mapping[str, Any], as_json: bool) -> None:
    """Prints measures by name, as one line of JSON or a line each."""
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        print(f"{name.replace('_', ' '):20} {f'{value:.6g}' if isinstance(value, float) else value}")


def load_one(path: Path, what: str | None = None) -> Tensor:
    """Loads a picture that the method can work with; errors call it `what`, or by its path."""
    return check_picture(load_picture(path), what or str(path))


def recipe_options(recipe: type[Recipe], options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a recipe that the command line gives, by name."""
    names = {item.name for item in dataclasses.fields(recipe)}
    return {name: value for name, value in vars(options).items() if name in names}


def parse_size(text: str) -> int | None:
    """Reads a number of pixels; None for "full"."""
    try:
        return None if text == "full" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or 'full', not '{text}'") from None


def parse_count(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return int(text)


def add_settings(parser: argparse.ArgumentParser, recipe: type[Recipe], title: str = PRESET_DEFAULTS) -> None:
    """Adds one option for each setting of a recipe; `recipe_options` reads those that are given."""
    group = parser.add_argument_group(title)
    for item in dataclasses.fields(recipe):
        optional = type(None) in get_args(item.type)
        kind: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{item.metadata['help']} ({item.default})"}
        if isinstance(item.default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        else:
            kind["type"] = parse_size if optional else item.type
            kind["metavar"] = "X" if item.type is float else "N"
        if optional:
            kind["help"] += "; 'full' for the pictures' own size"
        group.add_argument(f"--{item.name.replace('_', '-')}", **kind)


def add_pair(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the structure picture and the list of appearance pictures, which has one unless there may be several."""
    parser.add_argument("structure", type=Path, help="picture whose structure is kept")
    mixed = "; several are mixed, see --weights" if several else ""
    parser.add_argument(
        "appearance",
        type=Path,
        nargs="+" if several else 1,
        help=f"picture whose appearance is transferred{mixed}",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the file of the result."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the result")
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Adds the permission to replace files."""
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds the option for a run without progress bar."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_backbone(parser: argparse.ArgumentParser, default: str = DEFAULT_BACKBONE) -> None:
    """Adds the ViT and its device."""
    parser.add_argument(
        "--backbone",
        default=default,
        metavar="NAME|FILE",
        help="the ViT (default: %(default)s; see `splice weights list`)",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps … (default: %(default)s)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds the precision of the ViT."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="precision of the ViT's matrix products (default: %(default)s)",
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of one or several blocks."""
    layers = parser.add_mutually_exclusive_group()
    for flag, several, text in (
        ("--layer", 1, "block of the ViT (default: the deepest)"),
        ("--layers", "+", "several, side by side"),
    ):
        layers.add_argument(flag, dest="layers", type=int, nargs=several, default=[-1], metavar="N", help=text)
