"""What the commands share: options, interruption, logs, and results that are not lost."""

import argparse
import dataclasses
import json
import math
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, get_args

from torch import Tensor
from tqdm import tqdm

from .backbone import Backbone
from .catalogue import DEFAULT_BACKBONE
from .devices import DTYPES, pick_device, pick_dtype
from .errors import SpliceError
from .files import write_error
from .images import save_picture
from .settings import Recipe
from .transfer import Step

INTERRUPTED = 130
"""Exit status of a run that Ctrl-C ended."""


class Run(Protocol):
    """What a training has that can be watched, such as `Transfer` and `Inversion`."""

    step: int

    @property
    def steps(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Step]: ...


class Interruption:
    """Whether the user wants the run to stop."""

    is_set = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turns the first Ctrl-C into a request to stop after the step under way; a second one stops at once."""
    interruption = Interruption()

    def request(_signal: int, _frame: FrameType | None) -> None:
        interruption.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


def watched(run: Run, quiet: bool, name: str | None = None) -> Iterator[Step]:
    """The steps of a run behind a progress bar, to its end or to the first Ctrl-C."""
    with (
        interruptible() as stop,
        tqdm(run, name, unit="step", disable=quiet, mininterval=0.5, dynamic_ncols=True) as bar,
    ):
        shown = -math.inf
        for step in bar:
            if time.monotonic() - shown > 1:  # reading the losses waits for the device
                bar.set_postfix({name: f"{value:.3g}" for name, value in step.floats().items()}, refresh=False)
                shown = time.monotonic()
            yield step
            if stop.is_set:
                return


def save_result(picture: Tensor, path: Path, alpha: Tensor | None = None) -> Path:
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


class Log:
    """Lines of JSON in a file; where they cannot be written any more, the run goes on and the error waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        try:
            self.file = path.open("wb", buffering=0)
        except OSError as error:
            raise write_error(path, error) from None

    def write(self, values: dict[str, float]) -> None:
        """Adds a line."""
        if self.error is None:
            try:
                self.file.write(json.dumps(values).encode() + b"\n")
            except OSError as error:
                self.error = error

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def load_backbone(options: argparse.Namespace) -> Backbone:
    """The backbone that the options name, on their device."""
    device = pick_device(options.device)
    return Backbone.load(options.backbone, device, pick_dtype(options.dtype, device))


def given(recipe: type[Recipe], options: argparse.Namespace) -> dict[str, Any]:
    """Those numbers of a recipe that the command line gives."""
    names = {item.name for item in dataclasses.fields(recipe)}
    return {name: value for name, value in vars(options).items() if name in names}


def size(text: str) -> int | None:
    """An option's value: pixels, or "full"."""
    return None if text == "full" else int(text)


def share(text: str) -> float:
    """An option's value: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be from 0 to 1")
    return value


def distance(text: str) -> float:
    """An option's value: a number of pixels, at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def count(text: str) -> int:
    """An option's value: a number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def add_settings(parser: argparse.ArgumentParser, recipe: type[Recipe]) -> None:
    """One option for each number of a recipe; those not given keep the preset's value."""
    group = parser.add_argument_group("recipe (default: the preset's own number; in brackets that of `paper`)")
    for item in dataclasses.fields(recipe):
        optional = type(None) in get_args(item.type)
        flag = f"--{item.name.replace('_', '-')}"
        kind: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{item.metadata['help']} ({item.default})",
        }
        if isinstance(item.default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        else:
            kind["type"] = size if optional else type(item.default)
            kind["metavar"] = "N" if isinstance(item.default, int) else "X"
        if optional:
            kind["help"] += "; 'full' for the pictures' own size"
        group.add_argument(flag, **kind)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the result")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Precision of the ViT."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="precision of the ViT's matrix products (default: %(default)s)",
    )


def add_backbone(parser: argparse.ArgumentParser, default: str = DEFAULT_BACKBONE) -> None:
    """Which ViT, and on which device."""
    parser.add_argument(
        "--backbone",
        default=default,
        metavar="NAME|FILE",
        help="the ViT (default: %(default)s; see `splice weights list`)",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Which device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps … (default: %(default)s)")


def add_pair(parser: argparse.ArgumentParser, alpha: bool = True) -> None:
    """Structure and appearance picture, and where the result goes."""
    parser.add_argument("structure", type=Path, help="picture whose structure is kept")
    parser.add_argument("appearance", type=Path, help="picture whose look is given")
    add_output(parser)
    if alpha:
        parser.add_argument("--keep-alpha", action="store_true", help="keep the structure picture's transparency")
