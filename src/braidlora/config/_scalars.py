"""Plain YAML scalars by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2).

`no` and `1:30` are text, 010 is ten, 0o10 is eight, 3e-4 is a number, and 1_000 is text.
"""

from __future__ import annotations

import re
from typing import Any

LONGEST_NUMBER = 40  # digits; a longer number is a mistake, and Python takes quadratic time to parse it

_TABLE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("null", re.compile(r"null|Null|NULL|~|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    (
        "float",
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
    ),
)


def kind_of(text: str) -> str:
    """The type of an unquoted scalar: `null`, `bool`, `int`, `float` or `str`."""
    return next((kind for kind, pattern in _TABLE if pattern.fullmatch(text)), "str")


def scalar(kind: str, text: str) -> Any:
    """The value of `text` as a scalar of this type.

    Raises:
        ValueError: `text` is not of this type, or is a number of more than 40 digits.
    """
    if kind == "str":
        return text
    if kind != kind_of(text) and (kind, kind_of(text)) != ("float", "int"):
        raise ValueError(f"{text[:40]!r} is not of type {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if len(text) > LONGEST_NUMBER:
        raise ValueError(
            f"a number of {len(text)} characters; at most {LONGEST_NUMBER} are allowed. If it is text, quote it"
        )
    if kind == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)
    return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
