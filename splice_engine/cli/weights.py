"""`splice weights`: lists, fetches and finds the weights of the backbones."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from ..errors import SpliceError
from ..files import cache_folder
from ..vit import weights
from ..vit.catalogue import CATALOGUE, lookup
from ..vit.download import Progress


def add_weights(commands: Any) -> None:
    """Adds `splice weights` and its actions."""
    parser = commands.add_parser("weights", help="list, fetch or find the backbones' weights")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all backbones, and where their weights are")
    listing.set_defaults(run=list_weights)
    getting = actions.add_parser("get", help="fetch the weights of one")
    getting.set_defaults(run=get_weights)
    getting.add_argument("name")
    finding = actions.add_parser("where", help="path of the weights of one, or of the cache")
    finding.set_defaults(run=find_weights)
    finding.add_argument("name", nargs="?")


@contextmanager
def download_bar() -> Iterator[Progress]:
    """Follows a download with a bar in bytes, where there is a terminal to show it."""
    with ExitStack() as stack:
        bars: list[Any] = []

        def show(name: str, done: int, size: int | None) -> None:
            if not bars:
                if not done or not sys.stderr.isatty():
                    return
                bars.append(stack.enter_context(tqdm(desc=name, initial=done, unit="B", unit_scale=True)))
            bars[0].total = size
            bars[0].update(done - bars[0].n)

        yield show


def list_weights(_options: argparse.Namespace) -> int:
    """Prints one line for each backbone of the catalogue."""
    for entry in CATALOGUE.values():
        here = "here" if weights.find(entry) else "package" if entry.package else "hub"
        print(f"{entry.name:24} patch {entry.patch:2}  {here:8} {entry.licence}")
    return 0


def get_weights(options: argparse.Namespace) -> int:
    """Prints the path of a backbone's weights, fetched where need be."""
    with download_bar() as progress:
        path = weights.get(lookup(options.name), progress=progress)
    print(path)
    return 0


def find_weights(options: argparse.Namespace) -> int:
    """Prints the path of a backbone's weights if they are on this machine, or that of the cache."""
    if options.name is None:
        print(cache_folder())
        return 0
    path = weights.find(lookup(options.name))
    if path is None:
        raise SpliceError(f"the weights of {options.name} are not on this machine: `splice weights get {options.name}`")
    print(path)
    return 0
