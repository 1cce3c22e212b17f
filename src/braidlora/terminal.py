"""The one way to a terminal: text from data, files and recipes is shown, never obeyed.

Column names, labels, paths and predictions may hold escape sequences that move the cursor, recolor or retitle a
terminal, and direction marks that make one text look like another. They are written as Python writes them: `\\x1b`.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, TextIO

# C0 and C1 controls but line feed and tab, line separators, lone surrogates, direction marks, tags. Joiners stay:
# Persian, Indic scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
# What `braidlora preview` marks tokens with.
STYLES = BOLD, DIM, PLAIN = "\x1b[1;4m", "\x1b[2m", "\x1b[0m"
_STYLED = re.compile("(" + "|".join(map(re.escape, STYLES)) + ")")


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey written as an escape."""
    return _UNSAFE.sub(lambda found: ascii(found.group())[1:-1], text)


def json_printable(text: str) -> str:
    """JSON text with these characters as `\\uXXXX`, which is the same JSON."""

    def escaped(found: re.Match[str]) -> str:
        units = found.group().encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))

    return _UNSAFE.sub(escaped, text)


def say(*parts: Any, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """`print`, with `printable` parts."""
    print(*(printable(str(part)) for part in parts), file=file or sys.stdout, end=end, flush=flush)


def say_styled(text: str) -> None:
    """Print `text` with the `STYLES` in it. What comes from data must be `printable` already."""
    print("".join(part if part in STYLES else printable(part) for part in _STYLED.split(text)))


class Formatter(logging.Formatter):
    """Log records, printable."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
