"""`splice refine`: the instant transfer, its brightness optimised against tokens and patches of B."""

import argparse
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from ..files import check_place
from ..images import check_writable, save_picture
from ..settings import RefinementSettings
from ..training.refinement import Refinement
from ..training.result import render_result
from .common import add_backbone, add_dtype, add_quiet, add_settings, iterate_with_bar, load_backbone, recipe_options
from .inputs import add_inputs, load_inputs
from .outputs import Log, Outputs, check_distinct, report_end


def add_refine(commands: Any) -> None:
    """Adds `splice refine`."""
    parser = commands.add_parser("refine", help="refine the instant transfer itself, without a generator")
    parser.set_defaults(run=run_refine)
    add_inputs(parser)
    parser.add_argument("--log", type=Path, metavar="FILE", help="losses of every step, as lines of JSON")
    add_quiet(parser)
    add_backbone(parser)
    add_dtype(parser)
    add_settings(parser, RefinementSettings, "recipe (default in brackets)")


def run_refine(options: argparse.Namespace) -> int:
    """Refines the instant transfer of a pair of pictures."""
    settings = RefinementSettings(**recipe_options(RefinementSettings, options))
    check_writable(options.output, options.overwrite)
    if options.log:
        check_place(options.log, options.overwrite)
        check_distinct([options.output, options.log])
    inputs = load_inputs(options)
    run = Refinement(
        inputs.structure,
        inputs.appearances[0],
        load_backbone(options),
        settings,
        inputs.structure_mask,
        inputs.appearance_masks[0],
    )
    started = time.monotonic()
    with closing(Log(options.log)) as log:
        for step in iterate_with_bar(run, options.quiet):
            log.write({"step": step.index, **step.floats()})
    outputs = Outputs()
    outputs.write(options.output, partial(save_picture, render_result(run), alpha=inputs.alpha, overwrite=True))
    outputs.write(options.log, log.check)
    outputs.check()
    return report_end(run.step, run.steps, time.monotonic() - started, outputs.written)
