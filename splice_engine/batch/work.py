"""Works through a table: what is finished stays, the rest is given to workers, and what they make is stored."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ..errors import SpliceError
from ..images import check_format, check_mask, check_picture, load_mask, load_picture, sides
from .folder import BatchFolder, hash_file
from .job import Job, Outcome, ViT
from .processes import Workers
from .table import MASKS, Row, Table


class Batch:
    """A table that is worked through.

    Args:
        table: The rows.
        folder: Where the results go.
        vit: The backbone of all rows.

    Attributes:
        errors: Why rows have no result and how to mend it, by their numbers.
        found: Rows whose results were there already.
        made: Rows whose results were made.
    """

    def __init__(self, table: Table, folder: BatchFolder, vit: ViT) -> None:
        self.table, self.folder, self.vit = table, folder, vit
        self.errors = dict(table.errors)
        self.found = self.made = 0
        self._rows = {row.number: row for row in table.rows}
        self._hashes: dict[Path, str] = {}
        weights = Path(vit.name)
        self._backbone = hash_file(weights) if weights.is_file() else vit.name

    @property
    def count(self) -> int:
        """Rows of the table."""
        return len(self._rows) + len(self.table.errors)

    def work(self, workers: Workers) -> Iterator[int]:
        """Yields the number of each row that is finished or has failed.

        Raises:
            SpliceError: What keeps all rows from their results. Those that are finished stay.
        """
        yield from self.table.errors
        rows = iter(self.table.rows)
        while True:
            while workers.has_room and (row := next(rows, None)) is not None:
                try:
                    job = self._prepare(row)
                except SpliceError as error:
                    self.errors[row.number] = str(error)
                    job = None
                else:
                    self.found += job is None
                if job is None:
                    yield row.number
                else:
                    workers.give(job)
            if not workers.is_busy:
                return
            for job, outcome in workers.wait():
                self._settle(job, outcome)
                yield job.number

    def write_pages(self) -> None:
        """Writes the table of results and the page of strips as they are now.

        Raises:
            SpliceError: The system refuses to.
        """
        self.folder.write_pages(self._rows, self.errors)

    def _prepare(self, row: Row) -> Job | None:
        """What a row's result is made of; None where it is finished."""
        key = self._key(row)
        if self.folder.is_finished(row, key):
            return None
        pictures = {
            name: check_mask(load_mask(path), f"mask {path}")
            if name in MASKS
            else check_picture(load_picture(path), str(path))
            for name, path in row.files.items()
        }
        check_format(Path(row.output), sides(pictures["structure"]))
        arrays = {name: picture.numpy() for name, picture in pictures.items()}
        return Job(row.number, key, row.output, arrays, row.settings, row.best_of, self.vit)

    def _settle(self, job: Job, outcome: Outcome) -> None:
        if outcome.error is None:
            try:
                self.folder.store(self._rows[job.number], job.key, outcome)
                self.made += 1
            except SpliceError as error:
                self.errors[job.number] = str(error)
                self.write_pages()  # raises where nothing at all can be written any more
        elif outcome.ends_batch:
            raise SpliceError(outcome.error)
        else:
            self.errors[job.number] = outcome.error

    def _key(self, row: Row) -> str:
        """Stands for all that a row's result is made of: the contents of its files, the settings and the backbone."""
        files = {name: self._hash(path) for name, path in row.files.items()}
        parts = [
            files,
            asdict(row.settings),
            row.best_of,
            Path(row.output).suffix.lower(),
            self._backbone,
            self.vit.dtype,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = hash_file(path)
        return self._hashes[path]
