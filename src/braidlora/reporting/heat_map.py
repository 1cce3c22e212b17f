"""A heat map with its numbers in the cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from braidlora.reporting.panels import plain
from braidlora.reporting.plot import DIVERGING, SEQUENTIAL
from braidlora.tables import UNKNOWN

WRITTEN = 12  # a heat map with more rows or columns has no numbers
_MOST_TICKS = 40  # more rows than this are named in part
# Not "black" and "white", which follow the page's dark mode: these are on a cell, whose color stays.
_BLACK, _WHITE = "#010101", "#fefefe"
_DARK = 0.5  # luminance below which a number is white


def heat_map(
    axes: Any,
    matrix: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limits: tuple[float, float | None] = (0.0, 1.0),
    digits: int = 2,
    written: bool | None = None,
    every: int | None = None,
    title: str = "",
) -> Any:
    """A matrix of values; missing ones stay blank. Returns the image, for a color bar.

    Args:
        limits: of the color map, which diverges if the first is negative; None for the largest value.
        digits: of the numbers in the cells.
        written: whether cells have numbers; by default those of at most 12 rows and columns.
        every: names every so many rows; by default as many as 40 names need.
    """
    import numpy as np

    values = np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=float)
    colors = DIVERGING if limits[0] < 0 else SEQUENTIAL
    image = axes.imshow(
        values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest"
    )
    axes.grid(False)
    axes.set_title(title)
    axes.set_xticks(
        range(len(columns)),
        [plain(name) for name in columns],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    step = every or -(-len(rows) // _MOST_TICKS)
    axes.set_yticks(range(0, len(rows), step), [plain(name) for name in rows][::step])
    if written is None:
        written = max(values.shape) <= WRITTEN
    for (row, column), value in np.ndenumerate(values) if written else ():
        color = _BLACK
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            color = _WHITE if 0.299 * red + 0.587 * green + 0.114 * blue < _DARK else _BLACK
        text = UNKNOWN if np.isnan(value) else f"{round(value, digits) + 0.0:,.{digits}f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    return image
