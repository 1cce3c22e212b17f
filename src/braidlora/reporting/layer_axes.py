"""Lines over the layers of a model, which the figures of an analysis and of a study share."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from braidlora.reporting.panels import band, integer_ticks
from braidlora.reporting.plot import COLORS, DASHES, MARKERS

_LOG = 10.0  # lines that differ by more than this factor get a logarithmic scale
Point = tuple[int, float, float]
"""Layer, value, half width of the band around it."""


def slug(label: str) -> str:
    """A label as part of a file name; letters of any script stay."""
    return re.sub(r"[^\w.]+", "-", label).strip("-")


def short_names(modules: Sequence[str]) -> dict[str, str]:
    """`q_proj` for `self_attn.q_proj`, unless another module ends the same way."""
    leaves = [module.rsplit(".", 1)[-1] for module in modules]
    return {
        module: leaf if leaves.count(leaf) == 1 else module
        for module, leaf in zip(modules, leaves, strict=True)
    }


def layer_points(layers: Sequence[dict[str, Any]], *keys: str) -> list[Point]:
    """One point per layer number: the mean over its values, and over their standard deviations.

    Args:
        layers: entries of a section's `layers`; those without a number (an output head) are left out.
        keys: lead from an entry to its values, through lists: numbers, or `{"mean", "std"}`; None is skipped.
    """
    numbered: dict[int, list[Any]] = {}
    for entry in layers:
        if entry["layer"] is not None:
            numbered.setdefault(entry["layer"], []).extend(_values(entry, keys))
    return [
        (
            number,
            statistics.fmean(value["mean"] if isinstance(value, dict) else value for value in values),
            statistics.fmean(value["std"] if isinstance(value, dict) else 0.0 for value in values),
        )
        for number, values in sorted(numbered.items())
        if values
    ]


def _values(entry: Any, keys: Sequence[str]) -> list[Any]:
    if isinstance(entry, list):
        return [value for item in entry for value in _values(item, keys)]
    if keys:
        return _values(entry[keys[0]], keys[1:])
    return [] if entry is None else [entry]


def layer_line(axes: Any, points: Sequence[Point], style: int, label: str | None) -> None:
    """A line over the layers, in the color, mark and dash number `style`, with a band around it."""
    if not points:
        return
    layers, values, halves = zip(*sorted(points), strict=True)
    axes.plot(
        layers, values, color=COLORS[style], marker=MARKERS[style], linestyle=DASHES[style], markersize=4,
        linewidth=1.3, label=label, markevery=max(1, len(layers) // 16),
    )  # fmt: skip
    band(axes, layers, values, halves, COLORS[style])


def chance_line(axes: Any, chance: float | None) -> None:
    """The level of random subspaces."""
    if chance is not None:
        axes.axhline(chance, color="#555555", linestyle=(0, (1, 2)), linewidth=1.5, label="chance", zorder=1)


def layer_axis(axes: Any) -> None:
    """Integers on the axis of layers."""
    axes.set_xlabel("layer")
    integer_ticks(axes, bins=8)


def draw_drift(axes: Any, lines: Sequence[tuple[dict[str, Any], str]]) -> None:
    """Draw changes and their factors on a pair of panels: change of magnitude, change of direction."""
    magnitude, direction = axes
    for ax, quantity in zip(axes, ("magnitude", "direction"), strict=True):
        for index, (change, factor) in enumerate(lines):
            since = change["from"].replace("adapter_init", "start").replace("step-", "step ")
            label = f"{'ΔW' if factor == 'delta' else factor} since {since}"
            layer_line(ax, layer_points(change["layers"], factor, quantity), index, label)
    values = [value for line in magnitude.get_lines() for value in line.get_ydata() if value > 0]
    # B grows many times over while A changes by a few percent.
    if values and max(values) > _LOG * min(values):
        magnitude.set_yscale("log")
    else:
        magnitude.set_ylim(0.0, 1.1 * magnitude.dataLim.y1 or 1.0)  # or 1: nothing moved at all
    magnitude.set_title("change of magnitude")
    magnitude.set_ylabel("relative to before")
    direction.set_title("change of direction")
    direction.set_ylabel("1 − cosine")
    direction.set_ylim(0.0, 1.1 * direction.dataLim.y1 or 1.0)
    handles, labels = direction.get_legend_handles_labels()
    direction.figure.legend(handles, labels, loc="outside lower center", ncols=4 if len(labels) == 4 else 3)
    for ax in axes:
        layer_axis(ax)
