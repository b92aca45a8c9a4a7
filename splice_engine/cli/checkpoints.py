"""`--checkpoint-every` and `--resume`: a training that goes on after its process has ended."""

import argparse
import sys
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


def allow_resumption(options: argparse.Namespace) -> None:
    """A run that goes on may replace the files that it has written before."""
    if options.resume and checkpoint_path(options.output).is_file():
        options.overwrite = True


class Resumption:
    """The checkpoints of a run, where the options ask for them.

    Args:
        run: Of which no step has been taken yet; it is brought to where its checkpoint was written.
        options: With `checkpoint_every`, `resume` and `output`.

    Attributes:
        seconds: That the run has taken before.

    Raises:
        SpliceError: The checkpoint is that of another run.
    """

    def __init__(self, run: Transfer, options: argparse.Namespace) -> None:
        self._run, self._every, self.seconds = run, options.checkpoint_every, 0.0
        self._checkpoint: Checkpoint | None = None
        if not (options.checkpoint_every or options.resume):
            return
        self._checkpoint = Checkpoint(run, checkpoint_path(options.output))
        if not options.resume:
            return
        if self._checkpoint.exists:
            self.seconds = self._checkpoint.restore()
            print(f"splice: going on after step {run.step} of {run.steps}", file=sys.stderr)
        else:
            print(f"splice: no checkpoint at {self._checkpoint.path}: the run begins anew", file=sys.stderr)

    def save(self, seconds: float, interrupted: bool = False) -> None:
        """Writes the checkpoint where it is its turn; a disk that takes none does not end the run.

        Args:
            seconds: That the run has taken.
            interrupted: No further step is taken now.
        """
        run, every = self._run, self._every
        is_due = interrupted or (every is not None and run.step % every == 0)
        if self._checkpoint and is_due and run.steps_left:
            try:
                self._checkpoint.save(seconds)
            except SpliceError as error:
                tqdm.write(f"splice: {error}", file=sys.stderr)
                self._every = None

    def end(self) -> None:
        """The result is written: a checkpoint of the whole run has served its purpose."""
        if self._checkpoint and not self._run.steps_left:
            self._checkpoint.remove()
