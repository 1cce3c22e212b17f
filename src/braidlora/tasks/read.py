"""Read raw rows from files, saved datasets and the hub, each with its place (`rows.jsonl:12`).

A row that cannot be read is yielded with its problem; the caller decides whether that stops the run
(`prompt.bad_rows`). A problem that makes the rest of a file unreadable raises DataError at once.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from braidlora.config import SUFFIXES, DataSource
from braidlora.errors import DataError, Interrupted
from braidlora.hub_access import check_hub
from braidlora.paths import find_data, missing, places_searched
from braidlora.tasks._json_list import json_list
from braidlora.tasks._task import RawRow
from braidlora.tasks.encodings import json_encoding, text_lines
from braidlora.tasks.tables import csv_rows, dialect_of, xlsx_rows

__all__ = ["RawRow", "describe", "read_rows"]

_EXPANDED, _EXPANSION = 2**29, 100  # a Parquet file may expand to 512 MiB, and to 100 times its size
_PARQUET_ROWS = 64
_SMALLER = "Free memory, or split the file; rows excluded by `limit` or `where` take no memory."
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?$")


def read_rows(source: DataSource, part: str) -> Iterator[RawRow]:
    """All rows of `source` in order, before any filter.

    Args:
        source: the source in the recipe; its `format` overrides the file name's suffix.
        part: `train`, `validation` or `test`: the split to read if a dataset has several and the source names none.

    Raises:
        DataError: the source does not exist, does not have the expected format, or ends unexpectedly.
    """
    kind = source.format or _guess(source.source)
    _check_options(source, kind)
    if kind == "hub":
        yield from _hub(source, part)
        return
    path = find_data(source.source)
    if not path.exists():
        raise DataError(missing(source.source))
    if kind == "folder":
        yield from _folder(path, source, part)
        return
    if source.split is not None or source.subset is not None:
        raise DataError(
            f"{path}: `split` and `subset` apply to saved and hub datasets; a {kind} file has neither. Remove them, "
            "or select rows with `where`."
        )
    try:
        yield from _READERS[kind](path, source)
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
            raise DataError(f"{path}: out of memory while reading. {_SMALLER}") from None
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def describe(source: DataSource) -> str | None:
    """How a table is read, where that was detected or is not obvious; None for other sources.

    Raises:
        DataError: the encoding of the file is unclear.
    """
    kind = source.format or _guess(source.source)
    path = find_data(source.source)
    if kind == "csv" and path.is_file():
        return str(dialect_of(path, source))
    if kind in ("json", "jsonl") and path.is_file():
        encoding = source.encoding or json_encoding(path)
        return None if encoding == "utf-8" else f"encoding {encoding}"
    return None


_OPTIONS = {
    "delimiter": ("csv", "CSV files"),
    "encoding": ("csv json jsonl", "CSV and JSON files"),
    "sheet": ("xlsx", "Excel workbooks"),
}


def _check_options(source: DataSource, kind: str) -> None:
    for option, (kinds, names) in _OPTIONS.items():
        if getattr(source, option) is not None and kind not in kinds.split():
            raise DataError(
                f"{source.source}: `{option}` applies to {names}, and this is read as {kind}. Remove it, or set "
                "`format`."
            )


def _guess(source: str) -> str:
    path = find_data(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        return "folder"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if path.is_file():
        old = " Save an .xls workbook as .xlsx or CSV." if suffix in (".xls", ".ods", ".xlsb") else ""
        raise DataError(
            f"{source}: unknown file name suffix. Expected {', '.join(SUFFIXES)}; otherwise set `format`.{old}"
        )
    if _HUB_NAME.match(source):
        return "hub"
    raise DataError(missing(source))


def _json(path: Path, source: DataSource) -> Iterator[RawRow]:
    for line, value in json_list(path, source.encoding or json_encoding(path)):
        yield _object(f"{path}:{line}", value)


def _jsonl(path: Path, source: DataSource) -> Iterator[RawRow]:
    for number, line in enumerate(text_lines(path, source.encoding or json_encoding(path)), start=1):
        if not line.strip(" \t\r\n"):
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield RawRow(place, {}, f"not valid JSON: {_lower(error.msg)} (column {error.colno})")
        except (RecursionError, ValueError) as error:
            yield RawRow(place, {}, f"not readable JSON: {error}")
        else:
            yield _object(place, value)


def _object(place: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(place, value)
    return RawRow(place, {}, f"expected an object with named columns, got {json.dumps(value)[:60]}")


def _parquet(path: Path, source: DataSource) -> Iterator[RawRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    limit = _EXPANDED + _EXPANSION * path.stat().st_size
    number = expanded = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            groups = [table.metadata.row_group(at) for at in range(table.num_row_groups)]
            _check_expanded(path, sum(group.total_byte_size for group in groups), limit)
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for at in range(batch.num_rows):
                    number += 1
                    place = f"{path}:{number}"
                    try:
                        columns = batch.slice(at, 1).to_pylist()[0]
                    except UnicodeDecodeError:
                        yield RawRow(place, {}, "not UTF-8 text")
                    else:
                        # The metadata counts a repeated value once, so one kilobyte can hold gigabytes of rows.
                        expanded += _size(columns)
                        _check_expanded(path, expanded, limit)
                        yield RawRow(place, columns)
    except MemoryError:
        raise DataError(f"{path}: out of memory after {number} rows. {_SMALLER}") from None
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet: {error}.") from None


def _size(value: Any) -> int:
    """The approximate size of a row's values in bytes."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _check_expanded(path: Path, expanded: int, limit: int) -> None:
    if expanded > limit:
        size = path.stat().st_size
        raise DataError(
            f"{path}: {size:,} bytes expand to {expanded:,} or more; the limit for a file of this size is {limit:,}. "
            "Such a file can exhaust memory. If you trust it, save it as JSON Lines."
        )


def _folder(path: Path, source: DataSource, part: str) -> Iterator[RawRow]:
    import datasets

    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        listed = f" It contains {', '.join(names[:8])}." if names else ""
        raise DataError(f"{path}: expected a folder saved by `datasets` (save_to_disk), or a file.{listed}")
    try:
        data = datasets.load_from_disk(str(path))
    except Interrupted:
        raise
    except Exception as error:  # datasets and pyarrow raise many exception classes for a damaged folder
        raise DataError(f"{path}: not readable as a folder saved by `datasets`: {error}") from error
    if isinstance(data, dict):
        data = _split(str(path), data, source.split or part)
    elif source.split is not None:
        raise DataError(f"{path}: the dataset has no splits; remove `split: {source.split}`.")
    yield from _dataset_rows(str(path), data)


def _hub(source: DataSource, part: str) -> Iterator[RawRow]:
    check_hub()
    import datasets

    try:
        # No `trust_remote_code`: `datasets` itself rejects a dataset that needs a script.
        data = datasets.load_dataset(source.source, source.subset)
    except Interrupted:
        raise
    except Exception as error:  # network, hub and builder errors have no common base class
        raise DataError(
            f"{source.source}: no such file or folder ({places_searched(source.source)}), and the hub dataset could "
            f"not be loaded: {type(error).__name__}: {error}"
        ) from error
    name = f"{source.source}[{source.split or part}]"
    yield from _dataset_rows(name, _split(source.source, data, source.split or part))


def _split(name: str, data: Any, split: str) -> Any:
    if split not in data:
        raise DataError(
            f"{name}: no split {split!r}; the splits are {', '.join(map(str, data))}. Set `split`."
        )
    return data[split]


def _dataset_rows(name: str, data: Any) -> Iterator[RawRow]:
    import datasets

    # A class label is stored as a number; recipes and prompts use its name.
    names = {
        column: feature.names
        for column, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, columns in enumerate(data, start=1):
        for column, known in names.items():
            value = columns[column]
            columns[column] = known[value] if value is not None and 0 <= value < len(known) else None
        yield RawRow(f"{name}:{number}", columns)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


_READERS = {"json": _json, "jsonl": _jsonl, "csv": csv_rows, "parquet": _parquet, "xlsx": xlsx_rows}
