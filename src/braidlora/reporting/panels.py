"""What figures of several methods, tasks or clients share: a grid of small panels, one look per method, a legend."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from braidlora.reporting.plot import COLORS as ALL_COLORS
from braidlora.reporting.plot import DASHES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID_WIDTH = 10.0  # inches; the width of the page's column
COLORS = ALL_COLORS[:7]  # without yellow, which is too pale for a line on white
_COLUMNS = 4


def panel_grid(
    count: int, *, panel_height: float, margin: float = 0.5, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most four per row; fewer panels make a narrower figure.

    Args:
        count: number of panels, at least 1.
        panel_height: height of one panel in inches.
        margin: inches above and below the panels together, for the label of the axis.
        options: passed to matplotlib's `Figure.subplots`.
    """
    # 4 columns for 5, 6 or 9 panels would leave a ragged last row; 3 do not.
    columns = 3 if count in (5, 6, 9) else min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    width = GRID_WIDTH * {1: 0.55, 2: 0.75}.get(columns, 1.0)
    figure, axes = new_figure(width, rows * panel_height + margin, rows, columns, squeeze=False, **options)
    figure.set_layout_engine("constrained", h_pad=0.08)  # inches around each panel, above and below
    panels = used_panels(axes, count)
    for panel in panels[max(0, count - columns) :]:
        panel.tick_params(labelbottom=True)  # the lowest of its column, also if the last row is not full
    return figure, panels


def used_panels(axes: Any, count: int) -> list[Axes]:
    """The first `count` panels of a grid of axes; the others are removed."""
    panels = list(axes.flat)
    for panel in panels[count:]:
        panel.remove()
    return panels[:count]


def line_style(index: int) -> dict[str, Any]:
    """Color and dashes of the method in row `index`, the same in all figures; 7 colors and 8 dashes distinguish 56."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.4,
    }


def band(axes: Axes, x: Sequence[float], y: Sequence[float], halves: Sequence[float], color: str) -> None:
    """A pale band around a curve, with its half width at every point."""
    low, high = ([at + sign * half for at, half in zip(y, halves, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def legend(figure: Figure, labels: Sequence[str], styles: Sequence[int] | None = None) -> None:
    """A legend above all panels; the figure grows by its height.

    Args:
        styles: of `line_style`, by label; by default 0, 1, 2, ….
    """
    from matplotlib.lines import Line2D

    shown = [wrapped(label, 40) for label in labels]
    longest = max(len(line) for label in shown for line in label.split("\n"))
    columns = min(len(labels), max(1, int(figure.get_figwidth() * 13 / (longest + 8))))
    lines = math.ceil(len(labels) / columns) * max(label.count("\n") + 1 for label in shown)
    figure.set_figheight(figure.get_figheight() + 0.15 + 0.19 * lines)
    figure.legend(
        [Line2D([], [], **line_style(index)) for index in styles or range(len(labels))],
        shown,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=2.6,
    )


def integer_ticks(axes: Axes, bins: int = 5) -> None:
    """Ticks of steps, rounds or layers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=bins, min_n_ticks=1))


def wrapped(text: str, width: int = 28) -> str:
    """`text` in one or two lines of about `width` characters, broken after a space, `_`, `.`, `-` or `/`.

    A longer text loses its middle, because names differ at their ends.
    """
    if len(text) > 2 * width:
        text = f"{text[: width - 1]}…{text[-width:]}"
    if len(text) <= width:
        return plain(text)
    breaks = [
        found.end() for found in re.finditer(r"[\s_.\-/…]", text) if len(text) - width <= found.end() <= width
    ]
    place = breaks[-1] if breaks else width
    return plain(f"{text[:place].rstrip()}\n{text[place:]}")


def plain(text: str) -> str:
    """`text` for matplotlib, letter by letter: a name with dollar signs is not a formula."""
    return text.replace("$", r"\$")


def rows_height(labels: Sequence[str]) -> float:
    """Inches that one line per label needs on a vertical axis."""
    return len(labels) * max(0.16 + 0.07 * (wrapped(label).count("\n") + 1) for label in labels)


def name_rows(panels: Sequence[Axes], labels: Sequence[str]) -> None:
    """Name the rows of horizontal panels that share their vertical axis, the first row on top."""
    panels[0].set_yticks(range(len(labels)), [wrapped(label) for label in labels])
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    for panel in panels:
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
