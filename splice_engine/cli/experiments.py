"""The commands that show what features and losses do: `splice invert`, `ablate` and `curves`."""

import argparse
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..analysis.figures import loss_curves, sheet
from ..files import check_place
from ..images import check_format, check_writable, from_pil, save_picture, sides
from ..presets import DEFAULT_INVERSION, INVERSION_PRESETS, PRESETS, inversion_preset, preset
from ..settings import InversionSettings, Settings
from ..training.ablation import ablation, ablation_rows, ablation_settings
from ..training.inversion import INVERTIBLE, Inversion
from .common import (
    add_backbone,
    add_dtype,
    add_layers,
    add_output,
    add_pair,
    add_quiet,
    add_settings,
    iterate_with_bar,
    load_backbone,
    load_one,
    recipe_options,
)
from .outputs import Log, Outputs, check_distinct, read_log, report_end


def add_invert(commands: Any) -> None:
    """Adds `splice invert`."""
    parser = commands.add_parser("invert", help="reconstruct a picture from one of its features, to show what it holds")
    parser.set_defaults(run=run_invert)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--facet", default="cls", choices=INVERTIBLE, help="the feature (default: %(default)s)")
    add_layers(parser)
    parser.add_argument(
        "--preset", default=DEFAULT_INVERSION, choices=INVERSION_PRESETS, help="the recipe (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="loss of every step, as lines of JSON")
    add_quiet(parser)
    add_output(parser)
    add_backbone(parser)
    add_dtype(parser)
    add_settings(parser, InversionSettings)


def run_invert(options: argparse.Namespace) -> int:
    """Writes the picture that one layer's feature gives, or a sheet of those of several layers."""
    settings = inversion_preset(options.preset, **recipe_options(InversionSettings, options))
    check_writable(options.output, options.overwrite)
    if options.log:
        check_place(options.log, options.overwrite)
        check_distinct([options.output, options.log])
    picture = load_one(options.picture)
    check_format(options.output, sides(picture))
    backbone = load_backbone(options)
    layers = [backbone.resolve(layer) for layer in options.layers]
    row, started, taken = {options.picture.name: picture}, time.monotonic(), 0
    with closing(Log(options.log)) as log:
        for layer in layers:
            run, name = Inversion(picture, backbone, settings, layer, options.facet), f"{options.facet}, layer {layer}"
            for step in iterate_with_bar(run, options.quiet, name):
                log.write({"step": taken + step.index, name: step.total.item()})
            taken += run.step
            result = row[name] = run.image(min(sides(picture)))
            if run.steps_left:
                break
    outputs = Outputs()
    outputs.write(
        options.output, partial(save_picture, result if len(layers) == 1 else from_pil(sheet([row])), overwrite=True)
    )
    outputs.write(options.log, log.check)
    outputs.check()
    return report_end(taken, len(layers) * settings.steps, time.monotonic() - started, outputs.written)


def add_ablate(commands: Any) -> None:
    """Adds `splice ablate`."""
    parser = commands.add_parser("ablate", help="train once with all losses and once without each, side by side")
    parser.set_defaults(run=run_ablate)
    add_pair(parser)
    add_output(parser)
    parser.add_argument("--preset", default="paper", choices=PRESETS, help="the recipe (default: %(default)s)")
    add_quiet(parser)
    add_backbone(parser)
    add_dtype(parser)
    add_settings(parser, Settings)


def run_ablate(options: argparse.Namespace) -> int:
    """Writes a sheet of the pictures of a recipe without each of its losses."""
    settings = preset(options.preset, **recipe_options(Settings, options))
    runs = len(ablation_settings(settings))
    check_writable(options.output, options.overwrite)
    structure = load_one(options.structure, "structure picture")
    appearance = load_one(options.appearance[0], "appearance picture")
    results: dict[str, Tensor] = {}
    started, taken = time.monotonic(), 0
    for name, run in ablation(structure, appearance, load_backbone(options), settings):
        for _ in iterate_with_bar(run, options.quiet, name):
            pass
        results[name] = run.image()
        taken += run.step
        if run.steps_left:
            break
    outputs = Outputs()
    page = from_pil(sheet(ablation_rows(structure, appearance, results)))
    outputs.write(options.output, partial(save_picture, page, overwrite=True))
    outputs.check()
    return report_end(taken, runs * settings.all_steps, time.monotonic() - started, outputs.written)


def add_curves(commands: Any) -> None:
    """Adds `splice curves`."""
    parser = commands.add_parser("curves", help="draw the losses of a run from its log")
    parser.set_defaults(run=run_curves)
    parser.add_argument("log", type=Path, help="file that --log wrote")
    add_output(parser)


def run_curves(options: argparse.Namespace) -> int:
    """Writes a chart of the losses in a log."""
    check_writable(options.output, options.overwrite)
    save_picture(from_pil(loss_curves(read_log(options.log))), options.output, overwrite=options.overwrite)
    print(options.output)
    return 0
