"""Shared by the commands: options, interruption, logs, and saving the result of a long run."""

import argparse
import dataclasses
import json
import math
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, get_args

from torch import Tensor
from tqdm import tqdm

from ..errors import SpliceError
from ..files import write_error
from ..images import save_picture
from ..settings import Recipe
from ..training.run import Step
from ..vit.backbone import Backbone
from ..vit.catalogue import DEFAULT_BACKBONE
from ..vit.devices import DTYPES, pick_device, pick_dtype
from .weights import download_bar

INTERRUPTED = 130
"""Exit status of a run that Ctrl-C ended."""

PRESET_DEFAULTS = "recipe (default: the preset's own number; in brackets that of `paper`)"
"""Title of the options of a recipe that has presets."""


class Run(Protocol):
    """A run of training, such as `Transfer` or `Inversion`."""

    step: int

    @property
    def steps(self) -> int: ...

    @property
    def steps_left(self) -> int: ...

    def __iter__(self) -> Iterator[Step]: ...


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


def report_end(taken: int, steps: int, seconds: float, written: Iterable[Path | None]) -> int:
    """Prints how a run ended and the files that it has written; returns the exit status.

    Args:
        taken: Steps that were taken.
        steps: Steps of the whole run; fewer taken means that Ctrl-C ended it.
        seconds: How long it took.
        written: The files; None is left out.
    """
    names = ", ".join(str(path) for path in written if path)
    if taken < steps:
        print(f"interrupted after {taken} of {steps} steps; the picture so far: {names}")
        return INTERRUPTED
    print(f"{taken} steps in {seconds:.0f} s: {names}")
    return 0


def save_result(picture: Tensor, path: Path, alpha: Tensor | None = None) -> Path:
    """Saves the result of a run; where `path` cannot be written any more, in the system's temporary folder.

    Args:
        picture: `[1, 3, H, W]` in 0..1.
        path: Where it goes; a file that is there is replaced.
        alpha: Optional `[1, 1, H, W]` transparency.

    Returns:
        `path`.

    Raises:
        SpliceError: `path` cannot be written; the message says where the picture is instead.
    """
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
    """Lines of JSON in a file. Where a line cannot be written, the run goes on; `check` raises the error at its end.

    Args:
        path: The file, which is replaced; None writes nothing.

    Raises:
        SpliceError: The file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._error: OSError | None = None
        try:
            self._file = None if path is None else path.open("wb", buffering=0)
        except OSError as error:
            assert path is not None
            raise write_error(path, error) from None

    def write(self, values: dict[str, float]) -> None:
        """Adds a line."""
        if self._file is not None and self._error is None:
            try:
                self._file.write(json.dumps(values).encode() + b"\n")
            except OSError as error:
                self._error = error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def check(self) -> None:
        """Raises a SpliceError where a line could not be written."""
        if self.path is not None and self._error is not None:
            raise write_error(self.path, self._error)


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a file that a `Log` has written.

    Raises:
        SpliceError: There is no such file, or it is not a log.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise SpliceError(f"cannot read {path} ({reason}): name a file that --log wrote") from None
    steps = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            steps.append({name: float(value) for name, value in json.loads(line).items()})
        except (ValueError, TypeError, AttributeError):
            raise SpliceError(f"line {number} of {path} is not a step: name a file that --log wrote") from None
    return steps


def check_distinct(paths: Sequence[Path]) -> None:
    """Raises a SpliceError where two outputs have the same path."""
    for path, count in Counter(path.absolute() for path in paths).items():
        if count > 1:
            raise SpliceError(f"{path} is named for two outputs: give each a name of its own")


def load_backbone(options: argparse.Namespace) -> Backbone:
    """Loads the backbone that the options name, onto their device."""
    device = pick_device(options.device)
    with download_bar() as progress:
        return Backbone.load(options.backbone, device, pick_dtype(options.dtype, device), progress=progress)


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


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Adds the structure and the appearance picture."""
    parser.add_argument("structure", type=Path, help="picture whose structure is kept")
    parser.add_argument("appearance", type=Path, help="picture whose appearance is transferred")


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
