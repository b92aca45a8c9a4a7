"""The command line: `splice transfer`, `apply`, `measure`, `weights` and `demo`."""

import argparse
import dataclasses
import json
import math
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import weights
from .backbone import Backbone
from .catalogue import CATALOGUE, DEFAULT_BACKBONE, OFFLINE_BACKBONE, lookup
from .demo import load_pair
from .devices import DTYPES, pick_device, pick_dtype
from .errors import SpliceError
from .files import check_place, write_error
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

USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except SpliceError as error:
        print(f"splice: {error}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
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
    backbone = _backbone(options)
    run = Transfer(structure, appearance, backbone, settings, structure_mask=masks[0], appearance_mask=masks[1])
    started = time.monotonic()
    with ExitStack() as stack:
        log = stack.enter_context(closing(_Log(options.log))) if options.log else None
        stop = stack.enter_context(_interruptible())
        bar = stack.enter_context(tqdm(run, unit="step", disable=options.quiet, mininterval=0.5, dynamic_ncols=True))
        shown = -math.inf
        for step in bar:
            if log:
                log.write({"step": step.index, **step.floats(), "seconds": time.monotonic() - started})
            if time.monotonic() - shown > 1:  # reading the losses waits for the device
                bar.set_postfix({name: f"{value:.3g}" for name, value in step.floats().items()}, refresh=False)
                shown = time.monotonic()
            if options.every and run.step % options.every == 0 and run.step < run.steps:
                try:
                    save_picture(run.image(), _numbered(options.output, run.step), alpha, overwrite=True)
                except SpliceError as error:  # the run itself is worth more than a glimpse of it
                    bar.write(f"splice: {error}", file=sys.stderr)
                    options.every = None
            if stop.is_set:
                break
    result = run.image()
    path = _save_result(result, options.output, alpha)
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
        structure, appearance, _backbone(options), structure_mask=masks[0], appearance_mask=masks[1]
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
    measurement = measure(structure, appearance, output, _backbone(options), options.layer, options.size)
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
        print(weights.cache_folder())
        return 0
    path = weights.find(lookup(options.name))
    if path is None:
        raise SpliceError(f"the weights of {options.name} are not on this machine: `splice weights get {options.name}`")
    print(path)
    return 0


class _Interruption:
    is_set = False


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    """Turns the first Ctrl-C into a request to stop after the step under way; a second one stops at once."""
    interruption = _Interruption()

    def request(_signal: int, _frame: FrameType | None) -> None:
        interruption.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


def _save_result(picture: Tensor, path: Path, alpha: Tensor | None) -> Path:
    """Saves the picture that the work was for; where `path` fails by now, in the system's temporary folder."""
    try:
        save_picture(picture, path, alpha, overwrite=True)
        return path
    except SpliceError as error:
        try:
            rescue = Path(tempfile.mkdtemp(prefix="splice-")) / "rescued.png"
            save_picture(picture, rescue, alpha)
        except (OSError, SpliceError):
            raise error from None
        raise SpliceError(f"{error}. The picture is safe in {rescue}") from None


class _Log:
    """Lines of JSON; where they cannot be written any more, the run goes on and the error waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        try:
            self.file = path.open("wb", buffering=0)
        except OSError as error:
            raise write_error(path, error) from None

    def write(self, values: dict[str, float]) -> None:
        if self.error is None:
            try:
                self.file.write(json.dumps(values).encode() + b"\n")
            except OSError as error:
                self.error = error

    def close(self) -> None:
        self.file.close()


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
    twice = [path for path, count in Counter(path.absolute() for path in (*pictures, *others)).items() if count > 1]
    if twice:
        raise SpliceError(f"{twice[0]} is named for two outputs: give each a name of its own")


def _masks(options: argparse.Namespace) -> tuple[Tensor | None, Tensor | None]:
    """The masks of the structure and of the appearance picture."""
    structure, appearance = (
        None if path is None else check_mask(load_mask(path), f"mask {path}")
        for path in (options.structure_mask, options.appearance_mask)
    )
    return structure, appearance


def _backbone(options: argparse.Namespace) -> Backbone:
    device = pick_device(options.device)
    return Backbone.load(options.backbone, device, pick_dtype(options.dtype, device))


def _settings(options: argparse.Namespace) -> Settings:
    names = {item.name for item in dataclasses.fields(Settings)}
    return preset(options.preset, **{name: value for name, value in vars(options).items() if name in names})


def _size(text: str) -> int | None:
    return None if text == "full" else int(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return value


def _distance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each number of a recipe; those not given keep the preset's value."""
    group = parser.add_argument_group("recipe (defaults: the preset's)")
    for item in dataclasses.fields(Settings):
        flag = f"--{item.name.replace('_', '-')}"
        kind: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{item.metadata['help']} (paper: {item.default})",
        }
        if isinstance(item.default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        else:
            kind["type"] = _size if item.name == "size" else type(item.default)
            kind["metavar"] = "N" if isinstance(item.default, int) else "X"
        if item.name == "size":
            kind["help"] += "; 'full' for the pictures' own size"
        group.add_argument(flag, **kind)


def _add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("structure", type=Path, help="picture whose structure is kept")
    parser.add_argument("appearance", type=Path, help="picture whose look is given")
    _add_output(parser)
    parser.add_argument("--keep-alpha", action="store_true", help="keep the structure picture's transparency")
    parser.add_argument("--structure-mask", type=Path, metavar="FILE", help="white where the picture may change")
    parser.add_argument("--appearance-mask", type=Path, metavar="FILE", help="white where the appearance is taken from")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the result")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="precision of the ViT's matrix products (default: %(default)s)",
    )


def _add_backbone(parser: argparse.ArgumentParser, default: str = DEFAULT_BACKBONE) -> None:
    parser.add_argument(
        "--backbone",
        default=default,
        metavar="NAME|FILE",
        help="the ViT (default: %(default)s; see `splice weights list`)",
    )
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps … (default: %(default)s)")


def _add_training(parser: argparse.ArgumentParser, default_backbone: str = DEFAULT_BACKBONE) -> None:
    _add_backbone(parser, default_backbone)
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=PRESETS, help="the recipe (default: %(default)s)")
    _add_dtype(parser)
    parser.add_argument(
        "--save-generator", type=Path, metavar="FILE", help="keep the trained generator, as .safetensors"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="losses of every step, as lines of JSON")
    parser.add_argument("--every", type=_count, metavar="N", help="also write the picture every N steps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_settings(parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="splice", description="Paints one picture with the look of another, part by part, guided by DINO."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    transfer = commands.add_parser("transfer", help="train on a pair of pictures and write the result")
    transfer.set_defaults(run=_transfer)
    _add_pair(transfer)
    transfer.add_argument(
        "--strip", type=Path, metavar="FILE", help="also write both pictures and the result side by side"
    )
    _add_training(transfer)

    instant = commands.add_parser("instant", help="paint by semantic matching alone, in seconds and without training")
    instant.set_defaults(run=_instant)
    _add_pair(instant)
    _add_backbone(instant)
    _add_dtype(instant)
    instant.add_argument(
        "--texture",
        type=_share,
        default=TEXTURE,
        metavar="X",
        help="share of the appearance's texture, 0 to 1 (default: %(default)s)",
    )
    instant.add_argument(
        "--feather",
        type=_distance,
        default=FEATHER,
        metavar="X",
        help="pixels over which the change fades out beyond the structure mask (default: %(default)s)",
    )

    apply = commands.add_parser("apply", help="apply a saved generator to a picture")
    apply.set_defaults(run=_apply)
    apply.add_argument("generator", type=Path, help="file that --save-generator wrote")
    apply.add_argument("picture", type=Path)
    _add_output(apply)
    _add_device(apply)

    measuring = commands.add_parser("measure", help="measure how far a result is from both pictures")
    measuring.set_defaults(run=_measure, dtype="fp32")
    for name in ("structure", "appearance", "output"):
        measuring.add_argument(name, type=Path)
    measuring.add_argument("--json", action="store_true", help="print one line of JSON")
    measuring.add_argument("--layer", type=int, default=-1, metavar="N", help="block of the ViT (default: the deepest)")
    measuring.add_argument(
        "--size", type=_count, default=224, metavar="N", help="short side at which the ViT looks (default: %(default)s)"
    )
    _add_backbone(measuring)

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
    _add_training(demo, OFFLINE_BACKBONE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
