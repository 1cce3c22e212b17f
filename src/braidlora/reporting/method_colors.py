"""One look per method in every figure of every report, whatever else is in it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

# Positions in `panels.COLORS`: blue, orange, green, pink, sky, vermilion, black.
_FIXED = {"lora": 0, "hydralora": 1, "moelora": 2, "lora-matched": 4, "alora": 5}
_COLORS, _STYLES = 7, 56  # of `panels.line_style`: 7 colors and 8 dashes
# For variants: first the colors that no built-in method has, then those again with other dashes.
_FREE = [index for index in range(_STYLES) if index % _COLORS in (3, 6)] + [
    index for index in range(_COLORS, _STYLES) if index % _COLORS not in (3, 6)
]


def method_styles(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """A number for `line_style` and the palette by row of a comparison; built-in methods always get theirs.

    A variant's follows from its name, unless another variant in the report has it. Of a sweep's values the first has
    the look of its method.
    """
    taken: dict[int, int] = {}
    for at, row in enumerate(rows):
        index = _FIXED.get(row["name"].split("+")[0])
        if index is not None and index not in taken.values():
            taken[at] = index
    for at, row in enumerate(rows):
        if at not in taken:
            taken[at] = _free(row["name"], set(taken.values()))
    return [taken[at] for at in range(len(rows))]


def _free(name: str, taken: set[int]) -> int:
    start = zlib.crc32(name.encode()) % 2
    order = [_FREE[start], _FREE[1 - start], *_FREE[2:]]
    return next((index for index in order if index not in taken), start)
