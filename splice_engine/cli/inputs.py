"""What transfers work on: a structure picture, one or several appearance pictures, and their masks."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import SpliceError
from ..images import check_format, check_mask, load_alpha, load_mask, sides
from ..matching.mixture import pair_masks
from ..mixing import parse_weights, to_shares
from .common import OPAQUE, add_output, add_pair, load_one


@dataclass(frozen=True)
class Inputs:
    """Pictures with what belongs to them.

    Attributes:
        structure: `[1, 3, H, W]` in 0..1.
        appearances: Likewise, of any sizes.
        alpha: `[1, 1, H, W]` in 0..1, the transparency that the result shall have.
        structure_mask: `[1, 1, h, w]` in 0..1, where the picture may change.
        appearance_masks: Likewise, of each appearance picture the part that is transferred, or None.
        weights: Of the appearance pictures in a mixture; None is equal ones.
    """

    structure: Tensor
    appearances: Sequence[Tensor]
    alpha: Tensor | None = None
    structure_mask: Tensor | None = None
    appearance_masks: Sequence[Tensor | None] = (None,)
    weights: Sequence[float] | None = None

    @property
    def is_mixture(self) -> bool:
        """Whether there are several appearance pictures."""
        return len(self.appearances) > 1


def add_inputs(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds what `load_inputs` reads, and the result.

    Args:
        parser: Of the command.
        several: Whether it takes a mixture of several appearance pictures.
    """
    add_pair(parser, several)
    add_output(parser)
    parser.add_argument("--keep-alpha", action="store_true", help="keep the structure picture's transparency")
    parser.set_defaults(weights=None)
    if several:
        parser.add_argument(
            "--weights",
            type=_parse_weights,
            metavar="W,W",
            help="of several appearance pictures, such as 0.7,0.3; only their ratio counts (default: equal)",
        )
    add_masks(parser, several)


def add_masks(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the masks of both sides; arguments as for `add_inputs`."""
    parser.add_argument(
        "--structure-mask", type=Path, metavar="FILE", help=f"white where the picture may change; {OPAQUE}"
    )
    once = "; once for each appearance picture, in their order" if several else ""
    parser.add_argument(
        "--appearance-mask",
        type=Path,
        action="append",
        metavar="FILE",
        help=f"white where the appearance is taken from; {OPAQUE}{once}",
    )


def load_inputs(options: argparse.Namespace) -> Inputs:
    """Loads the pictures and masks that the options name.

    Raises:
        SpliceError: A file that cannot be worked with, or another number of weights or masks than of pictures.
    """
    to_shares(options.weights, len(options.appearance))  # refuses a wrong number before pictures are read
    structure = load_one(options.structure, "structure picture")
    check_format(options.output, sides(structure), options.keep_alpha)
    return Inputs(
        structure,
        load_appearances(options.appearance),
        load_alpha(options.structure) if options.keep_alpha else None,
        None if options.structure_mask is None else load_checked_mask(options.structure_mask),
        load_appearance_masks(options),
        options.weights,
    )


def load_appearances(paths: Sequence[Path]) -> list[Tensor]:
    """The appearance pictures; where there are several, errors name their files."""
    return [load_one(path, "appearance picture" if len(paths) == 1 else f"picture {path}") for path in paths]


def load_appearance_masks(options: argparse.Namespace) -> list[Tensor | None]:
    """The mask of each appearance picture, or None."""
    paths = pair_masks(options.appearance_mask, len(options.appearance))
    return [None if path is None else load_checked_mask(path) for path in paths]


def load_checked_mask(path: Path) -> Tensor:
    """A mask that selects something."""
    return check_mask(load_mask(path), f"mask {path}")


def _parse_weights(text: str) -> list[float]:
    try:
        return parse_weights(text)
    except SpliceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
