"""Raw rows from files, saved data sets and the hub, each with the place where it stands (`rows.jsonl:12`).

A row that cannot be read is yielded with its problem; whether that stops the run is the caller's decision
(`prompt.bad_rows`). What makes the rest of a file unreadable raises DataError at once.
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
_SMALLER = "Free memory, or divide the file; rows that `limit` or `where` leave out take none."
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?$")


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in its source: its columns, or the problem that keeps it from being read."""

    place: str
    columns: dict[str, Any]
    problem: str | None = None


def read_rows(source: DataSource, part: str) -> Iterator[RawRow]:
    """All rows of `source`, in order, before any filter.

    Args:
        source: where the rows are; `format` overrides what the name suggests.
        part: `train`, `validation` or `test`: the split that is read where a data set has several and the source
            names none.

    Raises:
        DataError: the source does not exist, is not what its format says, or breaks off in the middle.
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
            f"{path}: `split` and `subset` belong to data sets with several of them; a {kind} file has none. "
            "Remove them, or select rows with `where`."
        )
    try:
        yield from _READERS[kind](path)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise DataError(f"{path}: memory ran out while it was read. {_SMALLER}") from None
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except MemoryError:
        raise DataError(f"{path}: memory ran out while it was read. {_SMALLER}") from None


def _guess(source: str) -> str:
    path = find_data(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        return "folder"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if path.is_file():
        raise DataError(
            f"{source}: the format is not clear from the name. Known endings are {', '.join(SUFFIXES)}; "
            "otherwise set `format`."
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
    """The lines of a text file with their ends; only a line feed ends one (in a file without any, a carriage return).

    Bytes that are not UTF-8 become lone surrogates, so that the row that holds them can be named (or skipped).

    Raises:
        DataError: the file is UTF-16 or UTF-32.
    """
    with open(path, "rb") as file:
        start = file.peek(4)[:4] if path.stat().st_size else b""
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start == codecs.BOM_UTF32_BE:
            raise DataError(f"{path}: not UTF-8 but UTF-16 or UTF-32 text. Save the file as UTF-8.")
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
                f"{place}: not valid CSV: {record.problem}{extent}; where that row ends cannot be told, and all that "
                "follows it is lost. Correct the quotes of that row."
            )
        if header is None:
            if record.problem is not None:
                raise DataError(f"{place}: not a readable CSV header: {record.problem}{extent}.")
            header = record.cells
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{place}: the CSV header names a column twice: {', '.join(twice)}.")
        elif record.problem is not None:
            yield RawRow(place, {}, f"not valid CSV: {record.problem}{extent}")
        elif len(record.cells) != len(header):
            yield RawRow(
                place, {}, f"expected {len(header)} cells as in the header, got {len(record.cells)}{extent}"
            )
        else:
            yield RawRow(place, dict(zip(header, record.cells, strict=True)))
    if header is None:
        raise DataError(f"{path}:1: an empty file; expected a CSV header with the names of the columns.")


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
                        # The metadata counts a repeated value once, so a kilobyte can hold gigabytes of rows.
                        expanded += _size(columns)
                        _check_expanded(path, expanded, limit)
                        yield RawRow(place, columns)
    except MemoryError:
        raise DataError(f"{path}: {number} rows read, and then memory ran out. {_SMALLER}") from None
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet: {error}.") from None


def _size(value: Any) -> int:
    """About how many bytes the values of a row take."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _check_expanded(path: Path, expanded: int, limit: int) -> None:
    if expanded > limit:
        size = path.stat().st_size
        raise DataError(
            f"{path}: its {size:,} bytes expand to {expanded:,} or more; the limit for a file of this size is "
            f"{limit:,}. A file like this is made to exhaust memory. If it is yours and meant, save it as JSON Lines."
        )


def _folder(path: Path, source: DataSource, part: str) -> Iterator[RawRow]:
    import datasets

    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        listed = f" In it are {', '.join(names[:8])}." if names else ""
        raise DataError(
            f"{path}: not a folder saved by `datasets` (save_to_disk); for a file, name the file itself.{listed}"
        )
    try:
        data = datasets.load_from_disk(str(path))
    except Interrupted:
        raise
    except Exception as error:  # datasets and pyarrow raise many classes for a damaged folder
        raise DataError(f"{path}: not readable as a folder saved by `datasets`: {error}") from error
    if isinstance(data, dict):
        data = _split(str(path), data, source.split or part)
    elif source.split is not None:
        raise DataError(f"{path}: holds one data set without splits; remove `split: {source.split}`.")
    yield from _dataset_rows(str(path), data)


def _hub(source: DataSource, part: str) -> Iterator[RawRow]:
    import datasets

    try:
        # Never `trust_remote_code`: a data set that needs its own script is refused by `datasets` itself.
        data = datasets.load_dataset(source.source, source.subset)
    except Interrupted:
        raise
    except Exception as error:  # network, hub and builder errors share no class
        raise DataError(
            f"{source.source}: no such file or folder ({places_searched(source.source)}), and the hub data set could "
            f"not be loaded: {type(error).__name__}: {error}"
        ) from error
    name = f"{source.source}[{source.split or part}]"
    yield from _dataset_rows(name, _split(source.source, data, source.split or part))


def _split(name: str, data: Any, split: str) -> Any:
    if split not in data:
        raise DataError(f"{name}: no split {split!r}; known are {', '.join(map(str, data))}. Set `split`.")
    return data[split]


def _dataset_rows(name: str, data: Any) -> Iterator[RawRow]:
    import datasets

    # A class label is stored as a number; people write its name in recipes and prompts.
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
