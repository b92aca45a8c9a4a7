"""The output folder of a batch: results, what is known of each, and the pages that show them."""

import csv
import hashlib
import html
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from ..errors import SpliceError
from ..files import TEMPORARY, atomic_path, write_error
from .job import Outcome
from .table import Row

FORMAT = "splice-batch-1"
"""Marks the folder of a batch."""

MARKER, LOCK, RECORDS, STRIPS = "batch.json", ".lock", "records", "strips"
FIGURES = ("structure_distance", "appearance_distance", "appearance_cosine")


class BatchFolder:
    """Where the results of a batch go. A row is finished when its record is there, which is written last.

    Args:
        path: The folder, new, empty or of the same table.
        table: The table's file.
        overwrite: Go on in the folder of another table, and replace results made of other pictures or settings.
    """

    def __init__(self, path: Path, table: Path, overwrite: bool = False) -> None:
        self.path, self.table, self.overwrite = path, table.resolve(), overwrite
        self._records: dict[str, dict[str, Any]] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes the folder, or goes on in it; only one process at a time can.

        Raises:
            SpliceError: It is that of another batch or holds other files, is in use, or cannot be written.
        """
        is_new, lock = self.check(), FileLock(self.path / LOCK)
        try:
            for folder in (self.path, self.path / RECORDS, self.path / STRIPS):
                folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise SpliceError(f"another process works in {self.path}: wait for it, or name another folder") from None
        except OSError as error:
            raise write_error(self.path, error) from None
        try:
            self._remove_leftovers()
            write_whole(self.path / MARKER, json.dumps({"format": FORMAT, "table": str(self.table)}).encode())
            yield
        finally:
            if is_new:
                self._remove_if_empty()
            lock.release()

    def is_finished(self, row: Row, key: str) -> bool:
        """Whether a row's result is there.

        Args:
            row: Of the table.
            key: Stands for all that the result is made of.

        Raises:
            SpliceError: There is one that is made of other things, which must not be replaced.
        """
        record = self._read_record(row.output)
        if record is None or not (self.path / row.output).is_file():
            return False
        if record["key"] == key:
            self._records[row.output] = record
            return True
        if not self.overwrite:
            raise SpliceError(
                f"{self.path / row.output} is there already, made of other pictures or settings: name another output, "
                "or replace it with --overwrite"
            )
        return False

    def store(self, row: Row, key: str, outcome: Outcome) -> None:
        """Writes a row's result, whole or not at all.

        Raises:
            SpliceError: The system refuses to.
        """
        record = {"key": key, **outcome.figures}
        place = self._record(row.output)
        place.unlink(missing_ok=True)  # of a result that is replaced
        write_whole(self.path / row.output, outcome.picture)
        write_whole(self._strip(row.output), outcome.strip)
        write_whole(place, json.dumps(record).encode())
        self._records[row.output] = record

    def write_pages(self, rows: Mapping[int, Row], errors: Mapping[int, str]) -> None:
        """Writes `results.csv` and `index.html` of what is finished and what has failed.

        Args:
            rows: Of the table, by their numbers.
            errors: Of rows that failed, likewise.

        Raises:
            SpliceError: The system refuses to.
        """
        done = [row for number, row in sorted(rows.items()) if row.output in self._records and number not in errors]
        write_whole(self.path / "results.csv", self._list_results(done, rows, errors).encode("utf-8-sig"))
        write_whole(self.path / "index.html", self._draw_page(done, errors).encode())

    def _list_results(self, done: list[Row], rows: Mapping[int, Row], errors: Mapping[int, str]) -> str:
        lines: dict[int, dict[str, Any]] = {}
        for row in done:
            record = self._records[row.output]
            lines[row.number] = {**_describe(row), **record}
        for number, error in errors.items():
            lines[number] = {**(_describe(rows[number]) if number in rows else {}), "error": error}
        columns = ("row", "output", "structure", "appearance", "seed", *FIGURES, "backbone", "layer", "size", "dtype")
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, (*columns, "seconds", "error"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"row": number, **lines[number]} for number in sorted(lines))
        return buffer.getvalue()

    def _draw_page(self, done: list[Row], errors: Mapping[int, str]) -> str:
        strips = "\n".join(
            f'<figure><a href="{quote(row.output)}"><img loading="lazy" alt="{html.escape(row.output)}" '
            f'src="{quote(self._strip(row.output).relative_to(self.path).as_posix())}"></a>'
            f"<figcaption>{html.escape(self._caption(row))}</figcaption></figure>"
            for row in done
        )
        failed = "".join(f"<li>row {number}: {html.escape(text)}</li>" for number, text in sorted(errors.items()))
        title = html.escape(self.table.name)
        return PAGE.format(
            title=title,
            count=f"{len(done)} done, {len(errors)} failed",
            failed=f"<ul>{failed}</ul>" if failed else "",
            strips=strips,
        )

    def _caption(self, row: Row) -> str:
        record = self._records[row.output]
        figures = ", ".join(f"{name.replace('_', ' ')} {record[name]:.3g}" for name in FIGURES if name in record)
        return f"row {row.number}: {row.output} · {figures} · seed {record['seed']} · {record['seconds']:g} s"

    def check(self) -> bool:
        """Whether the folder is new or empty.

        Raises:
            SpliceError: It is that of another batch, or holds other files.
        """
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            raise SpliceError(f"{self.path} is a file: name a folder")
        try:
            if all(path.name == LOCK for path in self.path.iterdir()):
                return True
            marker = json.loads((self.path / MARKER).read_bytes())
            other = marker["table"] if marker["format"] == FORMAT else None
        except FileNotFoundError:
            other = None
        except OSError as error:
            raise SpliceError(f"cannot read {self.path} ({error.strerror}): name another folder") from None
        except (ValueError, KeyError, TypeError):
            other = None
        if other is None:
            raise SpliceError(f"{self.path} holds other files: name a new folder, or an empty one")
        if other != str(self.table) and not self.overwrite:
            raise SpliceError(
                f"{self.path} is the folder of another batch, that of {other}: name another one, or go on in it with "
                "--overwrite"
            )
        return False

    def _remove_leftovers(self) -> None:
        """Removes what a killed process has begun to write."""
        for folder in (self.path, self.path / RECORDS, self.path / STRIPS):
            for path in folder.glob(f"{TEMPORARY}*"):
                path.unlink()

    def _remove_if_empty(self) -> None:
        """Removes a new folder into which no page was written."""
        if not (self.path / "index.html").exists():
            with suppress(OSError):
                for name in (MARKER, LOCK):
                    (self.path / name).unlink(missing_ok=True)
                for folder in (self.path / RECORDS, self.path / STRIPS, self.path):
                    folder.rmdir()

    def _record(self, output: str) -> Path:
        return self.path / RECORDS / f"{output}.json"

    def _strip(self, output: str) -> Path:
        return self.path / STRIPS / f"{output}.jpg"

    def _read_record(self, output: str) -> dict[str, Any] | None:
        try:
            record = json.loads(self._record(output).read_bytes())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and "key" in record else None


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, in place of what is there; it appears whole or not at all.

    Raises:
        SpliceError: The system refuses to.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from None


def hash_file(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        SpliceError: It cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SpliceError(f"cannot read {path} ({error.strerror}): check the path") from None


def _describe(row: Row) -> dict[str, Any]:
    return {"output": row.output, "structure": str(row.structure), "appearance": str(row.appearance)}


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: clamp(1rem, 4vw, 2rem); color: #202020; background: #fff }}
h1 {{ font-size: clamp(1.2rem, 5vw, 2rem); line-height: 1.25 }}
h1, li, figcaption {{ overflow-wrap: anywhere }}
figure {{ margin: 0 0 2rem }}
img {{ max-width: 100%; display: block }}
figcaption {{ color: #555 }}
</style>
<h1>{title}</h1>
<p>{count} · <a href="results.csv">results.csv</a></p>
{failed}
{strips}
</html>
"""
