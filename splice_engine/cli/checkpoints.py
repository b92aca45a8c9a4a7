"""`--checkpoint-every` and `--resume`: a training that goes on after its process has ended."""

import argparse
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..errors import SpliceError
from ..training.checkpoint import Checkpoint
from ..training.transfer import Transfer
from .common import parse_count


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--checkpoint-every",
        type=parse_count,
        metavar="N",
        help="every N steps, write what --resume needs to OUT.checkpoint; removed once the result is there",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from OUT.checkpoint; begin where there is none, as after a kill"
    )


def checkpoint_path(output: Path) -> Path:
    """The checkpoint of a result."""
    return output.with_name(f"{output.name}.checkpoint")


def check_checkpoints(options: argparse.Namespace) -> None:
    """Lets a run that goes on replace the files that it has written before.

    Raises:
        SpliceError: The options ask for several seeds too, or would replace the checkpoint of another run.
    """
    path = checkpoint_path(options.output)
    if options.best_of > 1 and (options.checkpoint_every or options.resume):
        raise SpliceError(
            "--best-of keeps no checkpoints: leave out --checkpoint-every and --resume, or choose a --seed"
        )
    if not os.path.isfile(path):  # False, too, for a name that is too long, which is told later
        return
    if options.resume:
        options.overwrite = True
    elif options.checkpoint_every and not options.overwrite:
        raise SpliceError(
            f"{path} is of a run that was broken off: go on with --resume, or begin anew with --overwrite"
        )


class Resumption:
    """The checkpoints of a run, where the options ask for them.

    Args:
        run: Of which no step has been taken yet; it is brought to where its checkpoint was written.
        options: With `checkpoint_every`, `resume` and `output`.

    Attributes:
        step: Steps that the run had taken when it was broken off.

    Raises:
        SpliceError: The checkpoint is that of another run.
    """

    def __init__(self, run: Transfer, options: argparse.Namespace) -> None:
        self._run, self._every = run, options.checkpoint_every
        self.step, self._started = 0, time.monotonic()
        self._checkpoint: Checkpoint | None = None
        if not (options.checkpoint_every or options.resume):
            return
        self._checkpoint = Checkpoint(run, checkpoint_path(options.output))
        if options.resume and self._checkpoint.exists:
            self._started -= self._checkpoint.restore()
            self.step = run.step
            print(f"splice: going on after step {run.step} of {run.steps}", file=sys.stderr)
            return
        if options.resume:
            print(f"splice: no checkpoint at {self._checkpoint.path}: the run begins anew", file=sys.stderr)
        self.save()  # before anything else, so that there is one wherever there are files of the run

    @property
    def seconds(self) -> float:
        """That the run has taken so far, in all of its processes."""
        return time.monotonic() - self._started

    def save(self, interrupted: bool = False) -> None:
        """Writes the checkpoint where it is its turn; a disk that takes none does not end the run.

        Args:
            interrupted: No further step is taken now.
        """
        run, every = self._run, self._every
        is_due = interrupted or (every is not None and run.step % every == 0)
        if self._checkpoint and is_due and run.steps_left:
            try:
                self._checkpoint.save(self.seconds)
            except SpliceError as error:
                tqdm.write(f"splice: {error}", file=sys.stderr)
                self._every = None

    def end(self) -> None:
        """The result is written: a checkpoint of the whole run has served its purpose."""
        if self._checkpoint and not self._run.steps_left:
            self._checkpoint.remove()
