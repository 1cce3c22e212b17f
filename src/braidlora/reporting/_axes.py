"""What the figures of an analysis have in common: heat maps, and lines over the layers of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from braidlora.reporting.plot import COLORS, DASHES, DIVERGING, MARKERS, SEQUENTIAL

WRITTEN = 12  # a heat map of more rows or columns carries no numbers
_LOG = 10.0  # lines further apart than this times are drawn on a logarithmic scale
_TICKS = 40  # more rows than this are named in part
Point = tuple[int, float, float]
"""Layer, value, half width of the band around it."""


def slug(label: str) -> str:
    """A label as part of a file name; letters of any script stay."""
    return re.sub(r"[^\w.]+", "-", label).strip("-")


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """`self_attn.q_proj` is `q_proj` as long as no other module is."""
    leaves = [module.rsplit(".", 1)[-1] for module in modules]
    return {
        module: leaf if leaves.count(leaf) == 1 else module
        for module, leaf in zip(modules, leaves, strict=True)
    }


def heat_map(
    axes: Any,
    matrix: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    signed: bool = False,
    title: str = "",
) -> Any:
    """A matrix of values from 0 to 1 (from −1 to 1 if `signed`) with its numbers; what is missing stays blank."""
    import numpy as np

    values = np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=float)
    low = -1.0 if signed else 0.0
    image = axes.imshow(
        values,
        cmap=DIVERGING if signed else SEQUENTIAL,
        vmin=low,
        vmax=1.0,
        aspect="auto",
        interpolation="nearest",
    )
    axes.grid(False)
    axes.set_title(title)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    step = -(-len(rows) // _TICKS)
    axes.set_yticks(range(0, len(rows), step), list(rows)[::step])
    if max(values.shape) <= WRITTEN:
        for (i, j), value in np.ndenumerate(values):
            if np.isnan(value):
                axes.text(j, i, "–", ha="center", va="center", fontsize=7)
                continue
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    return image


def layer_line(axes: Any, points: Sequence[Point], style: int, label: str | None) -> None:
    """A line over the layers, in the colour, mark and dash number `style`, with a band around it."""
    if not points:
        return
    points = sorted(points)
    layers = [layer for layer, _, _ in points]
    values = [value for _, value, _ in points]
    color = COLORS[style]
    axes.plot(
        layers, values, color=color, marker=MARKERS[style], linestyle=DASHES[style], markersize=4, linewidth=1.3,
        label=label, markevery=max(1, len(layers) // 16),
    )  # fmt: skip
    low = [value - half for _, value, half in points]
    high = [value + half for _, value, half in points]
    axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)


def chance_line(axes: Any, chance: float | None, label: str | None = "chance") -> None:
    """Where random subspaces stand."""
    if chance is not None:
        axes.axhline(chance, color="#555555", linestyle=(0, (1, 2)), linewidth=1.5, label=label, zorder=1)


def layer_axis(axes: Any, label: str = "layer") -> None:
    """Whole numbers on the axis of layers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def over_modules(layers: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The entries of every layer number, over its modules; those without a number (an output head) are left out."""
    numbered: dict[int, list[dict[str, Any]]] = {}
    for entry in layers:
        if entry["layer"] is not None:
            numbered.setdefault(entry["layer"], []).append(entry)
    return numbered


def since(factor: str, reference: str) -> str:
    """What a line of a drift figure shows: `ΔW since step 20`."""
    name = "ΔW" if factor == "delta" else factor
    return f"{name} since {reference.replace('adapter_init', 'start').replace('step-', 'step ')}"


def drift_axes(axes: Any) -> None:
    """Titles, scales and legend of a pair of panels: change of magnitude, change of direction."""
    magnitude, direction = axes
    values = [value for line in magnitude.get_lines() for value in line.get_ydata() if value > 0]
    if values and max(values) > _LOG * min(
        values
    ):  # B grows many times over while A changes by a few per cent
        magnitude.set_yscale("log")
    else:
        magnitude.set_ylim(0.0, 1.1 * magnitude.dataLim.y1 or 1.0)  # or 1: nothing moved at all
    magnitude.set_title("change of magnitude")
    magnitude.set_ylabel("relative to before")
    direction.set_title("change of direction")
    direction.set_ylabel("1 − cosine")
    direction.set_ylim(0.0, 1.1 * direction.dataLim.y1 or 1.0)
    direction.legend(fontsize=7)
