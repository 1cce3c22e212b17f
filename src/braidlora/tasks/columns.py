"""Which column was probably meant: case, spaces and usual names of the fields. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from unicodedata import normalize

# What datasets call the fields, most usual first.
_USUAL: Mapping[str, Sequence[str]] = {
    "instruction": ("prompt", "question", "query", "problem", "input", "text", "request"),
    "output": ("response", "completion", "answer", "target", "solution", "reply", "label"),
    "text": (
        "sentence",
        "content",
        "document",
        "body",
        "review",
        "comment",
        "message",
        "input",
        "instruction",
    ),
    "label": ("class", "category", "target", "intent", "tag", "sentiment", "output"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "tools": ("functions",),
}
_DELIMITERS = {";": "semicolon", "\t": "tab", "|": "pipe", ",": "comma"}


def missing_column(columns: Mapping[str, Any], column: str, task: str, field: str) -> str:
    """That a row has no column for a field, what it has, and what was probably meant.

    Args:
        columns: of the row.
        column: that the field is read from.
        task, field: names, for the key in the recipe.
    """
    if delimiter := _delimiter_inside(columns):
        return (
            f"no column {column!r}: the header is a single cell, {next(iter(columns))!r}. Cells seem to be separated "
            f"by {delimiter}; remove `delimiter` from the recipe to have it detected"
        )
    there = ", ".join(map(str, columns)) or "none"
    key = f"tasks.{task}.columns.{field}"
    if column != field:
        start, otherwise = f"no column {column!r}, which {key} names (the columns are {there})", ""
        near = near_column(column, columns)
    else:
        start = f"no column {column!r} for `{field}` (the columns are {there})"
        otherwise = f"; name its column in {key}"
        near = near_column(column, columns, _USUAL.get(field, ()))
    return f"{start}. Did you mean {near!r}? Then set {key}={_quoted(near)}" if near else start + otherwise


def _delimiter_inside(columns: Mapping[str, Any]) -> str | None:
    """The delimiter by which a header in one cell seems to be separated, in words."""
    if len(columns) != 1:
        return None
    [header] = map(str, columns)
    return next((f"a {word}" for letter, word in _DELIMITERS.items() if letter in header), None)


def near_column(wanted: str, columns: Collection[Any], usual: Sequence[str] = ()) -> str | None:
    """The probable column: the same name but for case, spaces and hyphens, a usual name, or a similar one."""
    by_shape = {_shape(str(name)): str(name) for name in reversed(list(columns))}
    for name in (wanted, *usual):
        if _shape(name) in by_shape:
            return by_shape[_shape(name)]
    close = difflib.get_close_matches(_shape(wanted), by_shape, n=1, cutoff=0.75)
    return by_shape[close[0]] if close else None


def _shape(name: str) -> str:
    text = normalize("NFKC", name).casefold().replace("\ufeff", "")
    return "".join(letter for letter in text if letter.isalnum())


def _quoted(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else f"'{name}'"
