"""A figure with its name, title and caption, saved as PNG and SVG; colors and marks that survive print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers can tell apart; marks, dashes and hatches do so in black and white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "+++", "ooo")
SEQUENTIAL = "cividis"  # a perceptually uniform color map, for heat maps
DIVERGING = "RdBu_r"

_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.labelsize": 9.0,
    "figure.dpi": 150,
    "legend.fontsize": 8.0,
    "svg.hashsalt": "braidlora",  # the same figure gives the same bytes
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """One figure of a report.

    Args:
        name: file stem, also the anchor on the page.
        title: what it shows, a few words.
        caption: what it shows in full sentences; also the alternative text.
        figure: made by `new_figure`.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def save(self, directory: Path) -> list[Path]:
        """Write NAME.png and NAME.svg into `directory`, which is created if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            paths.append(directory / f"{self.name}.{suffix}")
            with style():
                self.figure.savefig(paths[-1], metadata=metadata)
            # The layout is final now; computing it again would double the time.
            self.figure.set_layout_engine("none")
        return paths


@contextmanager
def style() -> Iterator[None]:
    """Give everything drawn in this block, or in a function decorated with `@style()`, the look of all figures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("figures need matplotlib and jinja2: pip install 'braidlora[report]'") from None
    with matplotlib.rc_context(_STYLE):
        yield


@style()
def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """An empty figure of this size in inches and its axes, without pyplot's global state.

    Args:
        options: passed to matplotlib's `Figure.subplots` (`sharey=True`, …). One plot returns its axes, several return
            an array of axes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
