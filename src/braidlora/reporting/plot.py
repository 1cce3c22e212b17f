"""A figure with its name, title and caption, saved as PNG and SVG; colours and marks that survive print."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; marks, dashes and hatches tell them apart in black and white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "+++", "ooo")
SEQUENTIAL = "cividis"  # a colour map of even lightness, for heat maps
DIVERGING = "RdBu_r"

_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.dpi": 150,
    "svg.hashsalt": "braidlora",  # the same figure gives the same bytes
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """One figure of a report.

    Args:
        name: file stem, also the anchor on the page.
        title: what it shows, a few words.
        caption: what is to be seen, in words; it is the alternative text as well.
        figure: as `new_figure` made it.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """The figure as an `<svg>` element, to be put into a page."""
        buffer = io.StringIO()
        with style():
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        return text[text.index("<svg") :]

    def save(self, directory: Path) -> list[Path]:
        """Write NAME.png and NAME.svg into `directory`, which is made where it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            paths.append(directory / f"{self.name}.{suffix}")
            with style():
                self.figure.savefig(paths[-1], metadata=metadata)
            # The layout is settled by now; working it out once more would double the time.
            self.figure.set_layout_engine("none")
        return paths


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this: legends and texts made within get the sizes of all other figures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("figures need matplotlib and jinja2: pip install 'braidlora[report]'") from None
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """An empty figure of this size in inches and its axes, without pyplot's global state.

    Args:
        options: go to matplotlib's `Figure.subplots` (`sharey=True`, …). One plot gives the axes themselves, more give
            the array of them.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, **options)
    return figure, axes
