"""The command line: `splice transfer`, `instant`, `apply`, `measure`, `weights` and `demo`."""

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from . import weights
from .catalogue import CATALOGUE, DEFAULT_BACKBONE, OFFLINE_BACKBONE, lookup
from .cli_vision import add_vision_commands
from .console import (
    INTERRUPTED,
    Log,
    add_backbone,
    add_device,
    add_dtype,
    add_output,
    add_pair,
    add_settings,
    count,
    distance,
    given,
    load_backbone,
    save_result,
    share,
    watched,
)
from .demo import load_pair
from .devices import is_out_of_memory, pick_device
from .errors import SpliceError
from .files import cache_folder, check_place, write_error
from .generator import Generator
from .images import (
    check_mask,
    check_picture,
    check_writable,
    from_pil,
    load_alpha,
    load_mask,
    load_picture,
    save_picture,
)
from .masks import FEATHER
from .metrics import measure
from .palette import TEXTURE, Palette
from .pictures import comparison_strip
from .rendering import render
from .settings import DEFAULT_PRESET, PRESETS, Settings, preset
from .transfer import Transfer

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except SpliceError as error:
        print(f"splice: {error}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("splice: out of memory: lower --size, or choose a smaller --backbone", file=sys.stderr)
    except KeyboardInterrupt:
        print("splice: interrupted before there was a picture", file=sys.stderr)
        return INTERRUPTED
    return USER_ERROR


def _transfer(options: argparse.Namespace) -> int:
    settings = _settings(options)
    _check_outputs(options, settings)
    structure, appearance = load_picture(options.structure), load_picture(options.appearance)
    alpha = load_alpha(options.structure) if options.keep_alpha else None
    return _train(structure, appearance, settings, options, alpha, _masks(options))


def _demo(options: argparse.Namespace) -> int:
    folder = options.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from None
    options.output, options.strip = folder / "demo.png", folder / "demo-strip.png"
    settings = _settings(options)
    _check_outputs(options, settings)
    return _train(*load_pair(), settings, options, None)


def _train(
    structure: Tensor,
    appearance: Tensor,
    settings: Settings,
    options: argparse.Namespace,
    alpha: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> int:
    check_picture(structure, "structure picture"), check_picture(appearance, "appearance picture")
    backbone = load_backbone(options)
    run = Transfer(
        structure,
        appearance,
        backbone,
        settings,
        structure_mask=masks[0],
        appearance_mask=masks[1],
        generator=Generator.load(options.start) if options.start else None,
    )
    started = time.monotonic()
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(options.log))) if options.log else None
        for step in watched(run, options.quiet):
            if log:
                log.write({"step": step.index, **step.floats(), "seconds": time.monotonic() - started})
            if options.every and run.step % options.every == 0 and run.step < run.steps:
                try:
                    save_picture(run.image(), _numbered(options.output, run.step), alpha, overwrite=True)
                except SpliceError as error:  # the run itself is worth more than a glimpse of it
                    tqdm.write(f"splice: {error}", file=sys.stderr)
                    options.every = None
    result = run.image()
    path = save_result(result, options.output, alpha)
    if options.save_generator:
        run.generator.save(options.save_generator)
    if options.strip:
        labels = {"structure": structure, "appearance": appearance, f"{run.step} steps": result}
        save_picture(from_pil(comparison_strip(labels)), options.strip, overwrite=True)
    if log and log.error:
        raise write_error(log.path, log.error)
    told = [str(path), *(str(extra) for extra in (options.strip, options.save_generator, options.log) if extra)]
    if run.step < run.steps:
        print(f"interrupted after {run.step} of {run.steps} steps; the picture so far: {', '.join(told)}")
        return INTERRUPTED
    print(f"{run.step} steps in {time.monotonic() - started:.0f} s: {', '.join(told)}")
    return 0


def _instant(options: argparse.Namespace) -> int:
    check_writable(options.output, options.overwrite)
    structure, appearance = load_picture(options.structure), load_picture(options.appearance)
    alpha = load_alpha(options.structure) if options.keep_alpha else None
    masks = _masks(options)
    palette = Palette.between(
        structure,
        appearance,
        load_backbone(options),
        structure_mask=masks[0],
        appearance_mask=masks[1],
        looks=options.looks,
    )
    image = palette.image(texture=options.texture, feather=options.feather)
    save_picture(image, options.output, alpha, overwrite=options.overwrite)
    print(options.output)
    return 0


def _apply(options: argparse.Namespace) -> int:
    check_writable(options.output, options.overwrite)
    picture = check_picture(load_picture(options.picture))
    device = pick_device(options.device)
    generator = Generator.load(options.generator, device)
    result = render(generator, picture.to(device), size=generator.metadata.get("size"))
    save_picture(result, options.output, overwrite=options.overwrite)
    print(options.output)
    return 0


def _measure(options: argparse.Namespace) -> int:
    structure, appearance, output = (
        check_picture(load_picture(path), str(path)) for path in (options.structure, options.appearance, options.output)
    )
    measurement = measure(structure, appearance, output, load_backbone(options), options.layer, options.size)
    values = dataclasses.asdict(measurement)
    if options.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name.replace('_', ' '):20} {f'{value:.6g}' if isinstance(value, float) else value}")
    return 0


def _weights_list(options: argparse.Namespace) -> int:
    for entry in CATALOGUE.values():
        here = "here" if weights.find(entry) else "package" if entry.package else "gated" if entry.gated else "hub"
        print(f"{entry.name:24} patch {entry.patch:2}  {here:8} {entry.licence}")
    return 0


def _weights_get(options: argparse.Namespace) -> int:
    print(weights.get(lookup(options.name)))
    return 0


def _weights_where(options: argparse.Namespace) -> int:
    if options.name is None:
        print(cache_folder())
        return 0
    path = weights.find(lookup(options.name))
    if path is None:
        raise SpliceError(f"the weights of {options.name} are not on this machine: `splice weights get {options.name}`")
    print(path)
    return 0


def _numbered(path: Path, step: int) -> Path:
    return path.with_stem(f"{path.stem}-{step:05d}")


def _check_outputs(options: argparse.Namespace, settings: Settings) -> None:
    pictures = [options.output, *([options.strip] if options.strip else [])]
    if options.every:
        pictures += [
            _numbered(options.output, step) for step in range(options.every, settings.all_steps, options.every)
        ]
    others = [path for path in (options.save_generator, options.log) if path]
    for path in pictures:
        check_writable(path, options.overwrite)
    for path in others:
        check_place(path, options.overwrite)
    twice = [path for path, times in Counter(path.absolute() for path in (*pictures, *others)).items() if times > 1]
    if twice:
        raise SpliceError(f"{twice[0]} is named for two outputs: give each a name of its own")


def _masks(options: argparse.Namespace) -> tuple[Tensor | None, Tensor | None]:
    """The masks of the structure and of the appearance picture."""
    structure, appearance = (
        None if path is None else check_mask(load_mask(path), f"mask {path}")
        for path in (options.structure_mask, options.appearance_mask)
    )
    return structure, appearance


def _settings(options: argparse.Namespace) -> Settings:
    return preset(options.preset, **given(Settings, options))


def _add_masks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--structure-mask", type=Path, metavar="FILE", help="white where the picture may change")
    parser.add_argument("--appearance-mask", type=Path, metavar="FILE", help="white where the appearance is taken from")


def _add_training(
    parser: argparse.ArgumentParser, default_backbone: str = DEFAULT_BACKBONE, default_preset: str = DEFAULT_PRESET
) -> None:
    add_backbone(parser, default_backbone)
    parser.add_argument("--preset", default=default_preset, choices=PRESETS, help="the recipe (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument(
        "--save-generator", type=Path, metavar="FILE", help="keep the trained generator, as .safetensors"
    )
    parser.add_argument(
        "--start", type=Path, metavar="FILE", help="set out from a saved generator, in the place of a warm start"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="losses of every step, as lines of JSON")
    parser.add_argument("--every", type=count, metavar="N", help="also write the picture every N steps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_settings(parser, Settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="splice", description="Paints one picture with the look of another, part by part, guided by DINO."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    transfer = commands.add_parser("transfer", help="train on a pair of pictures and write the result")
    transfer.set_defaults(run=_transfer)
    add_pair(transfer)
    _add_masks(transfer)
    transfer.add_argument(
        "--strip", type=Path, metavar="FILE", help="also write both pictures and the result side by side"
    )
    _add_training(transfer)

    instant = commands.add_parser("instant", help="paint by semantic matching alone, in seconds and without training")
    instant.set_defaults(run=_instant)
    add_pair(instant)
    _add_masks(instant)
    add_backbone(instant)
    add_dtype(instant)
    instant.add_argument(
        "--texture",
        type=share,
        default=TEXTURE,
        metavar="X",
        help="share of the appearance's texture, 0 to 1 (default: %(default)s)",
    )
    instant.add_argument(
        "--feather",
        type=distance,
        default=FEATHER,
        metavar="X",
        help="pixels over which the change fades out beyond the structure mask (default: %(default)s)",
    )
    instant.add_argument(
        "--looks",
        type=count,
        default=1,
        metavar="N",
        help="times that the pair is matched: 2 finds more of the parts in twice the time (default: %(default)s)",
    )

    apply = commands.add_parser("apply", help="apply a saved generator to a picture")
    apply.set_defaults(run=_apply)
    apply.add_argument("generator", type=Path, help="file that --save-generator wrote")
    apply.add_argument("picture", type=Path)
    add_output(apply)
    add_device(apply)

    measuring = commands.add_parser("measure", help="measure how far a result is from both pictures")
    measuring.set_defaults(run=_measure, dtype="fp32")
    for name in ("structure", "appearance", "output"):
        measuring.add_argument(name, type=Path)
    measuring.add_argument("--json", action="store_true", help="print one line of JSON")
    measuring.add_argument("--layer", type=int, default=-1, metavar="N", help="block of the ViT (default: the deepest)")
    measuring.add_argument(
        "--size", type=count, default=224, metavar="N", help="short side at which the ViT looks (default: %(default)s)"
    )
    add_backbone(measuring)

    add_vision_commands(commands)

    store = commands.add_parser("weights", help="list, fetch or find the backbones' weights")
    actions = store.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="all backbones, and where their weights are").set_defaults(run=_weights_list)
    get = actions.add_parser("get", help="fetch the weights of one")
    get.set_defaults(run=_weights_get)
    get.add_argument("name")
    where = actions.add_parser("where", help="path of the weights of one, or of the cache")
    where.set_defaults(run=_weights_where)
    where.add_argument("name", nargs="?")

    demo = commands.add_parser("demo", help="an astronaut painted with a rear admiral, in a few minutes without a GPU")
    demo.set_defaults(run=_demo, keep_alpha=False)
    demo.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("splice-demo"),
        metavar="FOLDER",
        help="where the pictures go (default: %(default)s)",
    )
    demo.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    _add_training(demo, OFFLINE_BACKBONE, "draft")
    return parser


if __name__ == "__main__":
    sys.exit(main())
