"""Files of lines (`log.jsonl`, `rounds.jsonl`, predictions), split only at line feeds.

`str.splitlines` also splits at U+2028, U+2029, U+0085, form feeds and others, which JSON allows in strings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError
from braidlora.json_text import loads
from braidlora.runs._files import read_bytes


def split_lines(text: str) -> list[str]:
    """The lines of `text` without their line feeds (or carriage return and line feed)."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: Path) -> list[str]:
    """The lines of a file that a run wrote.

    Raises:
        CheckpointError: the file is missing, unreadable, or not UTF-8 (the message has the line).
    """
    return _decoded(path, read_bytes(path))


def read_jsonl(path: Path) -> list[Any]:
    """The values of a JSON Lines file that a run wrote.

    Raises:
        CheckpointError: as `read_lines`, or a line is not JSON.
    """
    return parse_jsonl(path, read_bytes(path))


def parse_jsonl(path: Path, data: bytes) -> list[Any]:
    """The values of the lines in `data`, which was read from `path`.

    Raises:
        CheckpointError: a line is not UTF-8 or not JSON.
    """
    values = []
    for number, line in enumerate(_decoded(path, data), start=1):
        try:
            values.append(loads(line))
        except ValueError as error:
            raise CheckpointError(
                f"{path}:{number}: not readable as JSON ({error}). The file is damaged."
            ) from None
    return values


def _decoded(path: Path, data: bytes) -> list[str]:
    try:
        return split_lines(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CheckpointError(f"{path}:{line}: not UTF-8 text; the file is damaged.") from None
