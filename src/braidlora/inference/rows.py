"""Rows to predict: from a file, standard input, the command line or Python, numbered from 1."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from braidlora.config import DataSource
from braidlora.errors import DataError
from braidlora.paths import find_data, missing
from braidlora.tasks import Row, Task
from braidlora.tasks._task import ChatRow
from braidlora.tasks.encodings import json_encoding, text_lines
from braidlora.tasks.messages import find_chat, read_chat
from braidlora.tasks.read import RawRow, read_rows
from braidlora.tasks.rows import BadRow, column_text


@dataclass(frozen=True)
class Given:
    """A row to predict, or why it cannot be.

    Attributes:
        number: its place among the rows, from 1.
        place: where it is, for messages.
        row: the task's fields; None if there is a problem.
    """

    number: int
    place: str
    row: Row | None
    problem: str | None = None


def read_given(raws: Iterable[RawRow], task: Task, columns: Mapping[str, str]) -> Iterator[Given]:
    """The rows of `raws` with the fields of the task.

    Args:
        columns: the column of each field, as in training; a row may also have the field's own name.
    """
    for number, raw in enumerate(raws, 1):
        try:
            yield Given(number, raw.place, _row(raw, task, columns))
        except BadRow as problem:
            yield Given(number, raw.place, None, str(problem))


def from_file(name: str) -> Iterator[RawRow]:
    """The rows of a json, jsonl, csv, xlsx or parquet file, or the lines of a text file; `-` is JSONL on stdin.

    Raises:
        DataError: the file is missing, or its format is not one of these.
    """
    if name == "-":
        return _from_stream(sys.stdin.buffer)
    if name.lower().endswith(".txt"):
        return _from_lines(name)
    return read_rows(DataSource(source=name), "test")


def from_values(values: Iterable[Any], place: str = "row") -> Iterator[RawRow]:
    """Rows from Python: mappings, or texts for the task's `text` or `instruction`."""
    for number, value in enumerate(values, 1):
        here = f"{place} {number}"
        if isinstance(value, str):
            yield RawRow(here, {_TEXT: value})
        elif isinstance(value, Mapping):
            yield RawRow(here, dict(value))
        else:
            yield RawRow(here, {}, f"expected a text or a mapping, got {type(value).__name__}")


_TEXT = "\0text"  # stands for the main field of any task


def _from_lines(name: str) -> Iterator[RawRow]:
    path = find_data(name)
    if not path.exists():
        raise DataError(missing(name))
    for number, line in enumerate(text_lines(path, json_encoding(path)), 1):
        if line.strip():
            yield RawRow(f"{name}:{number}", {_TEXT: line.rstrip("\r\n")})


def _from_stream(stream: BinaryIO) -> Iterator[RawRow]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        place = f"standard input:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            yield RawRow(place, {}, f"not valid JSON: {error}")
            continue
        if isinstance(value, dict):
            yield RawRow(place, value)
        else:
            yield RawRow(place, {}, f"expected an object with named columns, got {json.dumps(value)[:60]}")


def _row(raw: RawRow, task: Task, columns: Mapping[str, str]) -> Row:
    if raw.problem is not None:
        raise BadRow(raw.problem)
    if task.kind == "classify":
        return {"text": _required(raw, "text", columns)}
    if _TEXT in raw.columns:
        return {"instruction": _required(raw, "instruction", columns), "input": ""}
    if task.template.chat and (column := _chat_column(raw, columns)) is not None:
        chat = ChatRow(read_chat(raw.columns, column, columns.get("tools")))
        chat.place = raw.place
        return chat
    row = {name: _field(raw, name, columns) or "" for name in ("instruction", "input")}
    if not (row["instruction"] + row["input"]).strip():
        row["instruction"] = _required(raw, "instruction", columns)
    return row


def _chat_column(raw: RawRow, columns: Mapping[str, str]) -> str | None:
    """The column with a chat: that of the training, or one of the usual names."""
    return columns["messages"] if columns.get("messages") in raw.columns else find_chat(raw.columns, {})


def _required(raw: RawRow, name: str, columns: Mapping[str, str]) -> str:
    value = _field(raw, name, columns)
    if value is None:
        wanted = columns.get(name, name)
        also = f" (or `{name}`)" if wanted != name else ""
        there = ", ".join(map(str, raw.columns)) or "nothing"
        raise BadRow(f"no column {wanted!r}{also}; the row has {there}")
    if not value.strip():
        raise BadRow(f"`{name}` is empty")
    return value


def _field(raw: RawRow, name: str, columns: Mapping[str, str]) -> str | None:
    if name not in columns and name in columns.values():
        return None  # the column of this name is the training's column of another field
    for column in (_TEXT if name in ("text", "instruction") else None, columns.get(name, name), name):
        if column is not None and raw.columns.get(column) is not None:
            return column_text(raw, column)
    return None
