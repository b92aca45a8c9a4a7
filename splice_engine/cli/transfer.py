"""The commands around a training: `splice transfer`, `apply` and `measure`."""

import argparse
import dataclasses
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..analysis.figures import comparison_strip
from ..analysis.metrics import measure
from ..errors import SpliceError
from ..files import check_place, remove_leftovers
from ..images import check_format, check_writable, from_pil, save_picture, sides
from ..mixing import to_shares
from ..presets import DEFAULT_PRESET, PRESETS, preset
from ..settings import VIT_SIZE, Settings
from ..training.generator import Generator
from ..training.mixture import MixtureTransfer
from ..training.result import apply_generator, render_result
from ..training.transfer import Transfer
from ..vit.backbone import Backbone
from ..vit.catalogue import DEFAULT_BACKBONE
from ..vit.devices import is_out_of_memory, pick_device
from .best_of import add_best_of, choose_run
from .checkpoints import Resumption, add_checkpoints, check_checkpoints
from .common import (
    add_backbone,
    add_device,
    add_dtype,
    add_output,
    add_quiet,
    add_settings,
    iterate_with_bar,
    load_backbone,
    load_one,
    parse_count,
    print_values,
    recipe_options,
)
from .inputs import Inputs, add_inputs, load_inputs
from .outputs import Log, Outputs, check_distinct, report_end


def add_transfer(commands: Any) -> None:
    """Adds `splice transfer`."""
    parser = commands.add_parser("transfer", help="train on a pair of pictures and write the result")
    parser.set_defaults(run=run_transfer)
    add_inputs(parser, several=True)
    parser.add_argument(
        "--strip", type=Path, metavar="FILE", help="also write all pictures and the result side by side"
    )
    add_training(parser)


def run_transfer(options: argparse.Namespace) -> int:
    """Trains on a pair of pictures."""
    settings = preset(options.preset, **recipe_options(Settings, options))
    prepare_outputs(options, settings)
    return train(load_inputs(options), settings, options)


def add_apply(commands: Any) -> None:
    """Adds `splice apply`."""
    parser = commands.add_parser("apply", help="apply a saved generator to a picture")
    parser.set_defaults(run=run_apply)
    parser.add_argument("generator", type=Path, help="file that --save-generator wrote")
    parser.add_argument("picture", type=Path)
    add_output(parser)
    add_device(parser)


def run_apply(options: argparse.Namespace) -> int:
    """Applies a saved generator to a picture."""
    check_writable(options.output, options.overwrite)
    picture = load_one(options.picture, "picture")
    check_format(options.output, sides(picture))
    device = pick_device(options.device)
    generator = Generator.load(options.generator, device)
    save_picture(apply_generator(generator, picture.to(device)), options.output, overwrite=options.overwrite)
    print(options.output)
    return 0


def add_measure(commands: Any) -> None:
    """Adds `splice measure`."""
    parser = commands.add_parser("measure", help="measure how far a result is from both pictures")
    parser.set_defaults(run=run_measure, dtype="fp32")
    for name in ("structure", "appearance", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--layer", type=int, default=-1, metavar="N", help="block of the ViT (default: the deepest)")
    parser.add_argument(
        "--size",
        type=parse_count,
        default=VIT_SIZE,
        metavar="N",
        help="short side in pixels of what the ViT gets (default: %(default)s)",
    )
    add_backbone(parser)


def run_measure(options: argparse.Namespace) -> int:
    """Prints the distances of a picture from the two that it was made of."""
    structure, appearance, output = (load_one(path) for path in (options.structure, options.appearance, options.output))
    measurement = measure(structure, appearance, output, load_backbone(options), options.layer, options.size)
    values = dataclasses.asdict(measurement)
    print_values(values, options.json)
    return 0


def add_training(
    parser: argparse.ArgumentParser, default_backbone: str = DEFAULT_BACKBONE, default_preset: str = DEFAULT_PRESET
) -> None:
    """Adds what a training needs beside its pictures, with these defaults."""
    add_backbone(parser, default_backbone)
    parser.add_argument("--preset", default=default_preset, choices=PRESETS, help="the recipe (default: %(default)s)")
    add_dtype(parser)
    for flag, text in (
        ("--save-generator", "keep the trained generator, as .safetensors"),
        ("--start", "train a saved generator further, instead of a warm start"),
        ("--log", "losses of every step, as lines of JSON"),
    ):
        parser.add_argument(flag, type=Path, metavar="FILE", help=text)
    parser.add_argument("--every", type=parse_count, metavar="N", help="also write the picture every N steps")
    add_checkpoints(parser)
    add_best_of(parser)
    add_quiet(parser)
    add_settings(parser, Settings)


def prepare_outputs(options: argparse.Namespace, settings: Settings) -> None:
    """Checks that all files of a training can be written and no two are the same, and removes what a kill left."""
    check_checkpoints(options)
    pictures = [options.output, *([options.strip] if options.strip else [])]
    if options.every:
        steps = range(options.every, settings.all_steps, options.every)
        pictures += [_number(options.output, step) for step in steps]
    others = [path for path in (options.save_generator, options.log) if path]
    for path in pictures:
        check_writable(path, options.overwrite)
    for path in others:
        check_place(path, options.overwrite)
    check_distinct([*pictures, *others])
    if options.resume:
        for path in [*pictures, *others]:
            remove_leftovers(path)


def train(inputs: Inputs, settings: Settings, options: argparse.Namespace) -> int:
    """Trains, and writes all that the options ask for; returns the exit status."""
    start = Generator.load(options.start) if options.start else None
    begin = partial(_begin, inputs, load_backbone(options), start)
    run = (choice := choose_run(begin, settings, options)).run
    saver = Resumption(run, options)
    with closing(Log(options.log, saver.step)) as log:
        log.write(*choice.lines)
        if not choice.interrupted:
            _take_steps(run, log, saver, inputs.alpha, options)
    outputs = Outputs()
    result = _render(run, outputs, options)
    row = {"structure": inputs.structure, **_name_appearances(inputs), f"{run.step} steps": result}
    outputs.write(options.output, partial(save_picture, result, alpha=inputs.alpha, overwrite=True))
    outputs.write(options.strip, partial(save_picture, from_pil(comparison_strip(row)), overwrite=True))
    outputs.write(options.save_generator, run.generator.save)
    outputs.write(options.log, log.check)
    outputs.check()
    saver.end()
    return report_end(run.step, run.steps, saver.seconds, outputs.written)


def _begin(inputs: Inputs, backbone: Backbone, start: Generator | None, settings: Settings) -> Transfer:
    """The run on a pair, or on a mixture."""
    mask, masks = inputs.structure_mask, inputs.appearance_masks
    if not inputs.is_mixture:
        (appearance,), (appearance_mask,) = inputs.appearances, masks
        return Transfer(inputs.structure, appearance, backbone, settings, None, mask, appearance_mask, start)
    parts = inputs.structure, inputs.appearances, backbone, inputs.weights
    return MixtureTransfer(*parts, settings, None, mask, masks, start)


def _name_appearances(inputs: Inputs) -> dict[str, Tensor]:
    """The appearance pictures under their titles in a strip."""
    if not inputs.is_mixture:
        return {"appearance": inputs.appearances[0]}
    shares = to_shares(inputs.weights, len(inputs.appearances))
    pairs = enumerate(zip(inputs.appearances, shares, strict=True), 1)
    return {f"appearance {number}: {share:.0%}": picture for number, (picture, share) in pairs}


def _render(run: Transfer, outputs: Outputs, options: argparse.Namespace) -> Tensor:
    """The picture of a run; where memory does not suffice for it, the generator is written all the same."""
    try:
        return render_result(run)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    outputs.write(options.save_generator, run.generator.save)
    outputs.check()
    kept = f"the generator is in {options.save_generator}" if outputs.written else "--save-generator keeps the training"
    raise SpliceError(f"out of memory for the result: shrink the structure picture; {kept}")


def _take_steps(run: Transfer, log: Log, saver: Resumption, alpha: Tensor | None, options: argparse.Namespace) -> None:
    """Takes the steps of a run, logs each, and writes the picture and the checkpoint every so many."""
    every = options.every
    for step in iterate_with_bar(run, options.quiet):
        log.write({"step": step.index, **step.floats(), "seconds": saver.seconds})
        if every and run.step % every == 0 and run.step < run.steps:
            try:
                save_picture(run.image(), _number(options.output, run.step), alpha, overwrite=True)
            except (SpliceError, RuntimeError, MemoryError) as error:  # an intermediate picture is not worth the run
                if not (isinstance(error, SpliceError) or is_out_of_memory(error)):
                    raise
                tqdm.write(f"splice: {error}", file=sys.stderr)
                every = None
        saver.save()
    saver.save(interrupted=True)


def _number(path: Path, step: int) -> Path:
    """The path of the picture after so many steps."""
    return path.with_stem(f"{path.stem}-{step:05d}")
