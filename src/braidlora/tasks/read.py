"""Read raw rows from files, saved datasets and the hub, each with its place (`rows.jsonl:12`).

A row that cannot be read is yielded with its problem; the caller decides whether that stops the run
(`prompt.bad_rows`). A problem that makes the rest of a file unreadable raises DataError at once.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.config import DataSource
from braidlora.errors import DataError, Interrupted
from braidlora.paths import data_places, find_data, places_searched
from braidlora.tasks._csv import records
from braidlora.tasks._json_list import json_list

SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_EXPANDED, _EXPANSION = 2**29, 100  # a Parquet file may expand to 512 MiB, and to 100 times its size
_PARQUET_ROWS = 64
_SMALLER = "Free memory, or split the file; rows excluded by `limit` or `where` take no memory."
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?$")


@dataclass(frozen=True)
class RawRow:
    """One row of a source: its columns, or the problem that makes it unreadable."""

    place: str
    columns: dict[str, Any]
    problem: str | None = None


def read_rows(source: DataSource, part: str) -> Iterator[RawRow]:
    """All rows of `source` in order, before any filter.

    Args:
        source: the source in the recipe; its `format` overrides the file name's suffix.
        part: `train`, `validation` or `test`: the split to read if a dataset has several and the source names none.

    Raises:
        DataError: the source does not exist, does not have the expected format, or ends unexpectedly.
    """
    kind = source.format or _guess(source.source)
    if kind == "hub":
        yield from _hub(source, part)
        return
    path = find_data(source.source)
    if not path.exists():
        raise DataError(_missing(source.source))
    if kind == "folder":
        yield from _folder(path, source, part)
        return
    if source.split is not None or source.subset is not None:
        raise DataError(
            f"{path}: `split` and `subset` apply to saved and hub datasets; a {kind} file has neither. Remove them, "
            "or select rows with `where`."
        )
    try:
        yield from _READERS[kind](path)
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
            raise DataError(f"{path}: out of memory while reading. {_SMALLER}") from None
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _guess(source: str) -> str:
    path = find_data(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        return "folder"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if path.is_file():
        raise DataError(
            f"{source}: unknown file name suffix. Expected {', '.join(SUFFIXES)}; otherwise set `format`."
        )
    if _HUB_NAME.match(source):
        return "hub"
    raise DataError(_missing(source))


def _missing(given: str) -> str:
    """That a source does not exist, where it was looked for, and what lies nearby."""
    absent, folder = min(map(_first_absent, data_places(given)), key=lambda found: found[2])[:2]
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    known = sorted(name for name in names if not name.startswith("."))
    near = difflib.get_close_matches(absent.name, known, n=3, cutoff=0.5)
    if near:
        hint = f"Similar names in {folder.resolve()}: {', '.join(near)}"
    elif known:
        hint = f"{folder.resolve()} has {', '.join(known[:8])}{', …' if len(known) > 8 else ''}"
    else:
        hint = f"{folder.resolve()} is empty"
    return f"{given}: no such file or folder; {places_searched(given)}. {hint}."


def _first_absent(path: Path) -> tuple[Path, Path, int]:
    """The topmost part of `path` that does not exist, the folder in which it is missing, and the parts below it."""
    below = 0
    while not path.parent.exists():
        path, below = path.parent, below + 1
    return path, path.parent, below


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, split at line feeds (or at carriage returns in a file without line feeds).

    Bytes that are not UTF-8 become lone surrogates, so that the row can be reported or skipped.

    Raises:
        DataError: the file is UTF-16 or UTF-32.
    """
    with open(path, "rb") as file:
        start = file.peek(4)[:4] if path.stat().st_size else b""
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start == codecs.BOM_UTF32_BE:
            raise DataError(f"{path}: got UTF-16 or UTF-32 text; save the file as UTF-8.")
        if start.startswith(codecs.BOM_UTF8):
            file.seek(len(codecs.BOM_UTF8))
        first = next(file, b"")
        lines = [first] if first.endswith(b"\n") else [part + b"\n" for part in first.split(b"\r")]
        for line in itertools.chain(lines, file):
            yield line.decode("utf-8", errors="surrogateescape")


def _json(path: Path) -> Iterator[RawRow]:
    for line, value in json_list(path):
        yield _object(f"{path}:{line}", value)


def _jsonl(path: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_lines(path), start=1):
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


def _csv(path: Path) -> Iterator[RawRow]:
    header: list[str] | None = None
    for record in records(_lines(path)):
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
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{place}: the CSV header has duplicate columns: {', '.join(twice)}.")
        elif record.problem is not None:
            yield RawRow(place, {}, f"not valid CSV: {record.problem}{extent}")
        elif len(record.cells) != len(header):
            yield RawRow(
                place, {}, f"expected {len(header)} cells as in the header, got {len(record.cells)}{extent}"
            )
        else:
            yield RawRow(place, dict(zip(header, record.cells, strict=True)))
    if header is None:
        raise DataError(f"{path}:1: empty file; expected a CSV header with column names.")


def _parquet(path: Path) -> Iterator[RawRow]:
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


_READERS = {"json": _json, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
