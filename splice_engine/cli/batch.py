"""`splice batch`: a table of pairs, worked through on one machine or on a Ray cluster."""

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..batch.cluster import Cluster
from ..batch.folder import BatchFolder
from ..batch.job import ViT
from ..batch.processes import Processes, Workers, pick_devices
from ..batch.table import read_table
from ..batch.work import Batch
from ..presets import DEFAULT_PRESET, PRESETS
from ..settings import Settings
from ..vit import weights
from ..vit.catalogue import lookup
from .best_of import add_best_of
from .common import add_backbone, add_dtype, add_overwrite, add_quiet, add_settings, parse_count, recipe_options
from .outputs import INTERRUPTED
from .weights import download_bar

ROWS_FAILED = 1
"""Exit status of a batch of which some rows have no result."""

PAGE_SECONDS = 15.0
"""Least time between two versions of the pages."""


def add_batch(commands: Any) -> None:
    """Adds `splice batch`."""
    parser = commands.add_parser("batch", help="train on many pairs, the rows of a CSV file; goes on where it stopped")
    parser.set_defaults(run=run_batch)
    parser.add_argument(
        "table",
        type=Path,
        metavar="PAIRS.csv",
        help="with columns structure and appearance, and if need be structure_mask, appearance_mask, output, preset, "
        "best_of and any setting; files are relative to it",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new one, or that of this batch so far"
    )
    add_overwrite(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=parse_count, metavar="N", help="processes (default: one on each device)")
    where.add_argument("--ray", metavar="ADDRESS", help="work on a Ray cluster: host:port of its head, or auto")
    add_backbone(parser)
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, choices=PRESETS, help="of rows that name none (default: %(default)s)"
    )
    add_dtype(parser)
    add_best_of(parser)
    add_quiet(parser)
    add_settings(parser, Settings)


def run_batch(options: argparse.Namespace) -> int:
    """Trains on all pairs of a table that have no result yet."""
    table = read_table(options.table, options.preset, recipe_options(Settings, options), options.best_of)
    folder = BatchFolder(options.output, options.table, options.overwrite)
    folder.check()
    batch = Batch(table, folder, ViT(options.backbone, options.device, options.dtype))
    started = time.monotonic()
    with closing(_find_workers(options)) as workers, folder.open():
        finished = _work_through(batch, workers, options.quiet)
    before = f" ({batch.found} were there already)" if batch.found else ""
    failed = f", {len(batch.errors)} failed" if batch.errors else ""
    pages = f"{folder.path / 'index.html'}, {folder.path / 'results.csv'}"
    ended = "" if finished else "interrupted, the same command goes on: "
    done = f"{batch.found + batch.made} of {batch.count} pairs done in {time.monotonic() - started:.0f} s"
    print(f"{ended}{done}{before}{failed}: {pages}")
    return INTERRUPTED if not finished else ROWS_FAILED if batch.errors else 0


def _find_workers(options: argparse.Namespace) -> Workers:
    """What works on the rows: processes of this machine, which share one download of the weights, or a cluster."""
    if options.ray:
        return Cluster(options.ray)
    devices = pick_devices(options.device)
    if not Path(options.backbone).is_file():
        with download_bar() as progress:
            weights.get(lookup(options.backbone), progress=progress)
    count = options.workers or len(devices)
    return Processes([devices[index % len(devices)] for index in range(count)])


def _work_through(batch: Batch, workers: Workers, quiet: bool) -> bool:
    """Works on all rows beside a progress bar; returns whether that came to its end, and not to Ctrl-C."""
    written, is_over = time.monotonic(), False
    try:
        with tqdm(total=batch.count, unit="pair", disable=quiet, dynamic_ncols=True) as bar:
            for number in batch.work(workers):
                if number in batch.errors:
                    tqdm.write(f"splice: row {number}: {batch.errors[number]}", file=sys.stderr)
                bar.update()
                if time.monotonic() - written > PAGE_SECONDS:
                    batch.write_pages()
                    written = time.monotonic()
        is_over = True
    except KeyboardInterrupt:
        pass
    finally:
        if is_over or batch.made or batch.found:
            batch.write_pages()
    return is_over
