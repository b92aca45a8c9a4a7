"""The table of a batch: a CSV file with one transfer a row."""

import csv
import difflib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import SpliceError
from ..images import WRITABLE
from ..presets import preset
from ..settings import Settings
from .best_of import MOST

PICTURES = ("structure", "appearance")
MASKS = ("structure_mask", "appearance_mask")
SETTINGS: dict[str, Field[Any]] = {item.name: item for item in fields(Settings)}
COLUMNS = (*PICTURES, *MASKS, "output", "preset", "best_of", *SETTINGS)

LONGEST_NAME = 200
"""Bytes of an output's name: file systems take 255, and the names of what is kept of it are longer."""

DELIMITERS = ",;\t"
"""What spreadsheets put between cells, by country and format; the header tells which."""

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Row:
    """One transfer.

    Attributes:
        number: Of the row, as spreadsheets count: the header is row 1.
        structure: File of the structure picture.
        appearance: File of the appearance picture.
        structure_mask: File of its mask, or None.
        appearance_mask: Likewise.
        output: Name of the result, without a folder.
        settings: The recipe.
        best_of: Seeds that begin.
    """

    number: int
    structure: Path
    appearance: Path
    structure_mask: Path | None
    appearance_mask: Path | None
    output: str
    settings: Settings
    best_of: int = 1

    @property
    def files(self) -> dict[str, Path]:
        """The files that the row is made of, by their columns."""
        named = {name: getattr(self, name) for name in (*PICTURES, *MASKS)}
        return {name: path for name, path in named.items() if path is not None}


@dataclass(frozen=True)
class Table:
    """What a table says.

    Attributes:
        rows: Those that can be worked on.
        errors: What is wrong with each of the others, by the row's number.
    """

    rows: Sequence[Row]
    errors: Mapping[int, str]


def read_table(path: Path, preset_name: str, changes: Mapping[str, Any], best_of: int = 1) -> Table:
    """Reads a table.

    Args:
        path: UTF-8 text, with or without a byte-order mark; cells are separated by commas, semicolons or tabs. Files
            in it are relative to its folder.
        preset_name: The recipe of rows that name none.
        changes: Settings of all rows that do not set them.
        best_of: Seeds of rows that name no number.

    Raises:
        SpliceError: It cannot be read, or its columns are not those of a batch. A bad row raises nothing.
    """
    lines = _read_lines(path)
    columns = [cell.strip().lstrip("-").replace("-", "_").lower() for cell in lines[0]]
    _check_columns(path, columns)
    rows: list[Row] = []
    errors: dict[int, str] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines[1:], 2):
        cells = [cell.strip() for cell in line]
        if not any(cells):
            continue
        try:
            if len(cells) > len(columns):
                raise SpliceError(f"{len(cells)} cells for {len(columns)} columns: quote a cell with a comma in it")
            given = {name: cell for name, cell in zip(columns, cells, strict=False) if name and cell}
            row = _read_row(number, given, path.parent, preset_name, changes, best_of)
            first = numbers.setdefault(row.output.casefold(), number)
            if first != number:
                raise SpliceError(f"row {first} has the output {row.output} too: name another in the column 'output'")
        except SpliceError as error:
            errors[number] = str(error)
        else:
            rows.append(row)
    if not rows and not errors:
        raise SpliceError(f"{path} has no row below its header: add one for each pair")
    return Table(rows, errors)


def _read_lines(path: Path) -> list[list[str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SpliceError(f"cannot read {path} ({error.strerror}): name the CSV file of a batch") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise SpliceError(f"{path} is not UTF-8 text: save the table as CSV UTF-8") from None
    header = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise SpliceError(f"{path} is no table ({error}): save it as CSV UTF-8") from None
    if not lines:
        raise SpliceError(f"{path} is empty: its first row names the columns, {' and '.join(PICTURES)} at least")
    return lines


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for name in columns:
        if name and name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, 1)
            advice = f"did you mean '{near[0]}'?" if near else f"leave it out; there are {', '.join(COLUMNS[:7])}"
            raise SpliceError(f"{path} has a column '{name}', which is no setting of a transfer: {advice}")
        if name and columns.count(name) > 1:
            raise SpliceError(f"{path} has the column '{name}' twice: leave one out")
    for name in PICTURES:
        if name not in columns:
            raise SpliceError(f"{path} has no column '{name}': its first row names the columns, {name} among them")


def _read_row(
    number: int, given: Mapping[str, str], folder: Path, preset_name: str, changes: Mapping[str, Any], best_of: int
) -> Row:
    for name in PICTURES:
        if name not in given:
            raise SpliceError(f"the cell '{name}' is empty: name a picture")
    paths = {name: folder / given[name] for name in (*PICTURES, *MASKS) if name in given}
    for name, path in paths.items():
        if not path.is_file():
            raise SpliceError(f"no {'mask' if name in MASKS else 'picture'} at {path}: check the cell '{name}'")
    output = given.get("output") or f"{paths['structure'].stem}-{paths['appearance'].stem}.png"
    if output != Path(output).name or "\\" in output:
        raise SpliceError(f"the output '{output}' is in a folder: give its name alone")
    if Path(output).suffix.lower() not in WRITABLE:
        raise SpliceError(f"the output '{output}' is no name of a picture: end it in .png or .jpg")
    if len(os.fsencode(output)) > LONGEST_NAME:
        raise SpliceError(f"the output's name has more than {LONGEST_NAME} bytes: give a shorter one")
    own = {name: parse_setting(SETTINGS[name], cell) for name, cell in given.items() if name in SETTINGS}
    settings = preset(given.get("preset", preset_name), **{**changes, **own})
    if (count := given.get("best_of")) is not None:
        if not count.isdecimal() or not 1 <= int(count) <= MOST:
            raise SpliceError(f"best_of must be a whole number from 1 to {MOST}, not '{count}'")
        best_of = int(count)
    structure, appearance, structure_mask, appearance_mask = (paths.get(name) for name in (*PICTURES, *MASKS))
    assert structure is not None
    assert appearance is not None
    return Row(number, structure, appearance, structure_mask, appearance_mask, output, settings, best_of)


def parse_setting(item: Field[Any], cell: str) -> Any:
    """The value of a setting from its text.

    Args:
        item: Its field.
        cell: A number, "full" where the setting may be None, or yes or no in one of the usual words.

    Raises:
        SpliceError: The text is none of them.
    """
    hint = get_type_hints(Settings)[item.name]
    allowed = get_args(hint) or (hint,)
    if bool in allowed:
        if cell.lower() not in (*YES, *NO):
            raise SpliceError(f"{item.name} must be true or false, not '{cell}'")
        return cell.lower() in YES
    optional = type(None) in allowed
    if optional and cell.lower() == "full":
        return None
    number: type = float if float in allowed else int
    try:
        return number(cell)
    except ValueError:
        kind = "a number" if number is float else "a whole number"
        raise SpliceError(f"{item.name} must be {kind}{' or full' if optional else ''}, not '{cell}'") from None
