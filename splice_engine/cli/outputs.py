"""What the commands write: results that are not lost, logs, and how a run ended."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import SpliceError
from ..files import write_error

INTERRUPTED = 130
"""Exit status of a run that Ctrl-C ended."""


class Outputs:
    """The files of a run, each written on its own: where one cannot be written, the others still are.

    What cannot be written where it was to go is put into the system's temporary folder.

    Attributes:
        written: What is in its place.
    """

    def __init__(self) -> None:
        self.written: list[Path] = []
        self._errors: list[str] = []

    def write(self, path: Path | None, save: Callable[[Path], None]) -> None:
        """Writes a file.

        Args:
            path: Where it goes; None writes nothing.
            save: Writes it to a path, or raises a SpliceError.
        """
        if path is None:
            return
        try:
            save(path)
            self.written.append(path)
        except SpliceError as error:
            self._errors.append(f"{error}{_rescue(path, save)}")

    def check(self) -> None:
        """Raises a SpliceError where a file is not in its place; it says where it is, and what has been written."""
        if self._errors:
            written = f" (written: {', '.join(map(str, self.written))})" if self.written else ""
            raise SpliceError("; ".join(self._errors) + written)


def _rescue(path: Path, save: Callable[[Path], None]) -> str:
    """Writes a file into the system's temporary folder; returns the words that tell it."""
    try:
        rescued = Path(tempfile.mkdtemp(prefix="splice-")) / f"rescued{path.suffix}"
        save(rescued)
    except (OSError, SpliceError):
        return ""
    return f". It is safe in {rescued}"


def report_end(taken: int, steps: int, seconds: float, written: Iterable[Path]) -> int:
    """Prints how a run ended and the files that it has written; returns the exit status.

    Args:
        taken: Steps that were taken.
        steps: Steps of the whole run; fewer taken means that Ctrl-C ended it.
        seconds: How long it took.
        written: The files.
    """
    names = ", ".join(map(str, written))
    if taken < steps:
        print(f"interrupted after {taken} of {steps} steps; the picture so far: {names}")
        return INTERRUPTED
    print(f"{taken} steps in {seconds:.0f} s: {names}")
    return 0


class Log:
    """Lines of JSON in a file. Where a line cannot be written, the run goes on; `check` raises the error at its end.

    Args:
        path: The file, which is replaced; None writes nothing.
        kept: Lines at its beginning that stay, of steps before those that follow.

    Raises:
        SpliceError: The file cannot be opened.
    """

    def __init__(self, path: Path | None, kept: int = 0) -> None:
        self._error: OSError | None = None
        try:
            lines = path.read_bytes().splitlines(keepends=True)[:kept] if path and kept and path.is_file() else []
            self._file = None if path is None else path.open("r+b" if lines else "wb", buffering=0)
            if self._file is not None and lines:  # they are not written anew: a kill then would lose them
                self._file.truncate(self._file.seek(sum(map(len, lines))))
        except OSError as error:
            assert path is not None
            raise write_error(path, error) from None

    def write(self, *lines: dict[str, float]) -> None:
        """Adds lines."""
        if self._file is not None and self._error is None:
            try:
                self._file.write(b"".join(json.dumps(values).encode() + b"\n" for values in lines))
            except OSError as error:
                self._error = error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def check(self, path: Path) -> None:
        """Raises a SpliceError, which names the path, where a line could not be written."""
        if self._error is not None:
            raise write_error(path, self._error)


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
