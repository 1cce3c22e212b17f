"""All terminal output goes through here: control characters in data, files and recipes are escaped.

Column names, labels, paths and predictions may contain escape sequences that move the cursor, recolor or retitle the
terminal, or direction marks that disguise text. They are printed as Python escapes: `\\x1b`.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, TextIO

# C0 and C1 controls except line feed and tab, line separators, lone surrogates, direction marks, tags. Joiners are
# kept: Persian, Indic scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
# How `braidlora preview` marks tokens.
STYLES = BOLD, DIM, PLAIN = "\x1b[1;4m", "\x1b[2m", "\x1b[0m"
_STYLED = re.compile("(" + "|".join(map(re.escape, STYLES)) + ")")


def printable(text: str) -> str:
    """`text` with every control character escaped."""
    return _UNSAFE.sub(lambda found: ascii(found.group())[1:-1], text)


def json_printable(text: str) -> str:
    """JSON text with control characters as `\\uXXXX`; parses to the same value."""

    def escaped(found: re.Match[str]) -> str:
        units = found.group().encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))

    return _UNSAFE.sub(escaped, text)


def say(*parts: Any, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """`print` with every part passed through `printable`."""
    print(*(printable(str(part)) for part in parts), file=file or sys.stdout, end=end, flush=flush)


def say_styled(text: str) -> None:
    """Print `text`, keeping the escape codes in `STYLES` and escaping all others."""
    print("".join(part if part in STYLES else printable(part) for part in _STYLED.split(text)))


class Formatter(logging.Formatter):
    """Formats log records with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
