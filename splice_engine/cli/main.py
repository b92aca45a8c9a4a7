"""The command `splice`: one parser for all commands, and errors as exit statuses."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import SpliceError
from ..vit.devices import is_out_of_memory
from .analysis import add_attention, add_pca, add_similarity
from .batch import add_batch
from .clip import add_clip, add_flicker
from .common import prepare_console
from .demo import add_demo
from .experiments import add_ablate, add_curves, add_invert
from .instant import add_instant, add_interpolate
from .outputs import INTERRUPTED
from .refine import add_refine
from .transfer import add_apply, add_measure, add_transfer
from .weights import add_weights

USER_ERROR = 2
"""Exit status of a command that cannot be run as it was given, the same as argparse's own."""

COMMANDS = (
    add_transfer,
    add_instant,
    add_interpolate,
    add_refine,
    add_apply,
    add_clip,
    add_measure,
    add_batch,
    add_flicker,
    add_pca,
    add_similarity,
    add_attention,
    add_invert,
    add_ablate,
    add_curves,
    add_weights,
    add_demo,
)
"""What adds each command to the parser, in the order of the help text."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: The words after `splice`; None takes those of the process.

    Returns:
        The exit status: 0, `USER_ERROR`, `INTERRUPTED`, or that of a batch with failed rows.
    """
    prepare_console()
    options = build_parser().parse_args(arguments)
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; parsed options name the function of their command as `run`."""
    parser = argparse.ArgumentParser(
        prog="splice",
        description="Renders one picture with the appearance of another, part by part, guided by DINO features.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser
