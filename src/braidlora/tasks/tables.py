"""Tables: CSV with any delimiter and encoding, and Excel workbooks. No torch here."""

from __future__ import annotations

import datetime
import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.config import DataSource
from braidlora.errors import DataError
from braidlora.tasks._csv import records
from braidlora.tasks._task import RawRow
from braidlora.tasks.encodings import find_encoding, text_lines

_DELIMITERS = (",", ";", "\t", "|")
_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
_SAMPLE = 200  # lines from which the delimiter is found
_EXCEL_HINT = re.compile(r'^"?sep=(.)"?\r?\n?$')
_EXPANDED, _EXPANSION = 2**29, 100  # a workbook may expand to 512 MiB, and to 100 times its size


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written; `found` are the properties that were detected rather than given."""

    delimiter: str
    encoding: str
    found: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = {0: "as given", 1: f"{self.found[0]} detected" if self.found else "", 2: "both detected"}
        delimiter = _NAMES.get(self.delimiter, repr(self.delimiter))
        return f"CSV, delimiter {delimiter}, encoding {self.encoding} ({how[len(self.found)]})"


def dialect_of(path: Path, source: DataSource) -> Dialect:
    """Delimiter and encoding of a CSV file: those of the recipe, otherwise detected.

    Raises:
        DataError: the encoding is unclear.
    """
    encoding = source.encoding or find_encoding(path)
    delimiter = source.delimiter or _delimiter(list(itertools.islice(text_lines(path, encoding), _SAMPLE)))
    given = {"delimiter": source.delimiter, "encoding": source.encoding}
    return Dialect(delimiter, encoding, tuple(name for name, value in given.items() if value is None))


def _delimiter(lines: Sequence[str]) -> str:
    """The delimiter under which the header has several cells, and most records as many as the header."""
    if lines and (hint := _EXCEL_HINT.match(lines[0])):
        return hint[1]
    best, found = (0.0, 1), ","
    for delimiter in _DELIMITERS:
        sample = [record for record in records(lines, delimiter) if record.problem is None]
        if not sample or len(sample[0].cells) < 2:
            continue
        columns, rest = len(sample[0].cells), sample[1:]
        share = sum(len(record.cells) == columns for record in rest) / len(rest) if rest else 1.0
        if (share, columns) > best:
            best, found = (share, columns), delimiter
    return found


def csv_rows(path: Path, source: DataSource) -> Iterator[RawRow]:
    """The rows of a CSV file, whose first record has the names of the columns.

    Raises:
        DataError: the file has no header, or a cell is never closed.
    """
    dialect = dialect_of(path, source)
    lines = text_lines(path, dialect.encoding)
    first = next(lines, "")
    lines = itertools.chain(["\n" if _EXCEL_HINT.match(first) else first], lines)
    header: list[str] | None = None
    for record in records(filter(None, lines), dialect.delimiter):
        place = f"{path}:{record.first}"
        extent = f" (lines {record.first} to {record.last})" if record.last > record.first else ""
        if record.never_closed:
            raise DataError(
                f"{place}: not valid CSV: {record.problem}{extent}; the end of that row cannot be determined, so the "
                "rest of the file is unreadable. Correct the quotes of that row."
            )
        if header is None:
            if record.problem is not None:
                raise DataError(f"{place}: not a readable CSV header: {record.problem}{extent}.")
            header = record.cells
            _check_header(header, place, "the CSV header")
        elif record.problem is not None:
            yield RawRow(place, {}, f"not valid CSV: {record.problem}{extent}")
        elif len(record.cells) != len(header):
            yield RawRow(place, {}, _wrong_count(record.cells, header, dialect, extent))
        else:
            yield RawRow(place, dict(zip(header, record.cells, strict=True)))
    if header is None:
        raise DataError(f"{path}:1: empty file; expected a CSV header with column names.")


def _wrong_count(cells: Sequence[str], header: Sequence[str], dialect: Dialect, extent: str) -> str:
    name = _NAMES.get(dialect.delimiter, repr(dialect.delimiter))
    more = (
        f"; a cell with a {name} in it needs quotes" if len(cells) > len(header) and dialect.delimiter else ""
    )
    return f"expected {len(header)} cells as in the header, got {len(cells)}{extent} (delimiter {name}{more})"


def _check_header(header: Sequence[str], place: str, what: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{place}: {what} has duplicate columns: {', '.join(twice)}.")


def xlsx_rows(path: Path, source: DataSource) -> Iterator[RawRow]:
    """The rows of a sheet, whose first row has the names of the columns; formulas give their last value.

    Raises:
        DataError: openpyxl is not installed, the file is no workbook, or it has no such sheet.
    """
    try:
        import openpyxl
    except ImportError:
        raise DataError(
            f"{path}: reading Excel workbooks needs openpyxl: pip install 'braidlora[xlsx]'. Or save the sheet as CSV."
        ) from None
    _check_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a workbook has besides cells
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zipfile, XML and openpyxl errors have no common base class
        raise DataError(
            f"{path}: not readable as an Excel workbook: {type(error).__name__}: {error}."
        ) from None
    try:
        sheets = [sheet.title for sheet in book.worksheets]
        if source.sheet is not None and source.sheet not in sheets:
            raise DataError(
                f"{path}: no sheet {source.sheet!r}; the sheets are {', '.join(map(repr, sheets))}. Set `sheet`."
            )
        if not sheets:
            raise DataError(f"{path}: has no sheet with cells.")
        sheet = book[source.sheet or sheets[0]]
        sheet.reset_dimensions()  # some programs record wrong ones
        yield from _sheet_rows(f"{path}[{sheet.title}]", sheet)
    finally:
        book.close()


def _sheet_rows(place: str, sheet: Any) -> Iterator[RawRow]:
    header: list[str] | None = None
    for number, cells in enumerate(sheet.iter_rows(), start=1):
        values = [_value(cell.value) for cell in cells]
        while values and values[-1] is None:
            values.pop()
        if not values:
            continue
        here = f"{place}:{number}"
        if header is None:
            header = ["" if value is None else str(value) for value in values]
            if "" in header:
                raise DataError(
                    f"{here}: column {header.index('') + 1} has no name; the first row of a sheet needs the names of "
                    "its columns."
                )
            _check_header(header, here, "the first row of the sheet")
            continue
        broken = next((cell for cell in cells if getattr(cell, "data_type", "") == "e"), None)
        if broken is not None:
            yield RawRow(here, {}, f"cell {broken.coordinate} has the error {broken.value}")
        elif len(values) > len(header):
            yield RawRow(here, {}, f"expected {len(header)} cells as in the first row, got {len(values)}")
        else:
            values += [None] * (len(header) - len(values))
            yield RawRow(here, dict(zip(header, values, strict=True)))
    if header is None:
        raise DataError(f"{place}: is empty; expected a first row with the names of the columns.")


def _value(value: Any) -> Any:
    """A cell's value as text, number or None; dates as ISO 8601."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time | datetime.datetime):
        return value.isoformat()
    return str(value) if isinstance(value, datetime.timedelta) else value


def _check_size(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        old = " It looks like the old .xls format; save it as .xlsx or CSV." if _is_old(path) else ""
        raise DataError(f"{path}: not readable as an Excel workbook: {error}.{old}") from None
    limit = _EXPANDED + _EXPANSION * path.stat().st_size
    if expanded > limit:
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes expand to {expanded:,}; the limit for a file of this size is "
            f"{limit:,}. Such a file can exhaust memory. If you trust it, save the sheet as CSV."
        )


def _is_old(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
