"""`--best-of`: several seeds begin, the best goes on."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

from ..batch.best_of import MOST, BestOf
from ..settings import Settings
from ..training.transfer import Transfer
from .common import iterate_with_bar, parse_count


@dataclass(frozen=True)
class Choice:
    """The run that goes on.

    Attributes:
        run: Of the best seed.
        lines: Of the log, for the steps that it has taken.
        interrupted: Whether Ctrl-C ended the choice before it was made.
    """

    run: Transfer
    lines: list[dict[str, float]] = field(default_factory=list)
    interrupted: bool = False


def add_best_of(parser: argparse.ArgumentParser) -> None:
    """Adds the option."""
    parser.add_argument(
        "--best-of",
        type=parse_best_of,
        default=1,
        metavar="N",
        help="try N seeds and keep the best by its distances, at most 1.8 times the cost of one",
    )


def parse_best_of(text: str) -> int:
    """Reads a number of seeds."""
    count = parse_count(text)
    if count > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST}, not {count}")
    return count


def choose_run(begin: Callable[[Settings], Transfer], settings: Settings, options: argparse.Namespace) -> Choice:
    """The run of the settings, or that of the best of several seeds, whose scores are printed."""
    if options.best_of == 1:
        return Choice(begin(settings))
    selection = BestOf(begin, settings, options.best_of)
    for _ in iterate_with_bar(selection, options.quiet, f"{options.best_of} seeds"):
        pass
    for score in selection.scores:
        print(score)
    run = selection.choose()
    lines = [{"step": step.index, **step.floats()} for step in selection.taken]
    return Choice(run, lines, selection.steps_left > 0)
