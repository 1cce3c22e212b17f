"""The figures of `braidlora analyze`, from the numbers of its `analysis.json` alone."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import Any

from braidlora.reporting.heat_map import heat_map
from braidlora.reporting.layer_axes import (
    Point,
    chance_line,
    draw_drift,
    layer_axis,
    layer_line,
    short_names,
    slug,
)
from braidlora.reporting.model_plots import gradient_plots, router_plot
from braidlora.reporting.plot import COLORS, Plot, new_figure, style
from braidlora.reporting.study_plots import study_plots

_SPACES = {"A": "row spaces of A", "B": "column spaces of B"}


def analysis_plots(analysis: dict[str, Any]) -> list[Plot]:
    """A plot for everything that the analysis holds.

    Args:
        analysis: what `analyze`, `analyze_run` or `run_study` returned, or the content of `analysis.json`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plots = []
    if similarity := analysis.get("similarity"):
        plots += _similarity_plots(similarity)
    for label, drift in (analysis.get("drift") or {}).items():
        plots += _drift_plot(label, drift)
    for label, routers in (analysis.get("routers") or {}).items():
        if routers is not None:
            plots.append(router_plot(label, routers))
    for label, gradients in (analysis.get("gradients") or {}).items():
        plots += gradient_plots(label, gradients)
    if study := analysis.get("study"):
        plots += study_plots(study)
    return _with_unique_names(plots)


def _with_unique_names(plots: list[Plot]) -> list[Plot]:
    """Labels such as `a b` and `a-b` give plots of one name; the later ones get a number."""
    names: list[str] = []
    for plot in plots:
        tries = (plot.name if number == 1 else f"{plot.name}-{number}" for number in itertools.count(1))
        names.append(next(name for name in tries if name not in names))
    return [dataclasses.replace(plot, name=name) for plot, name in zip(plots, names, strict=True)]


def _similarity_plots(section: dict[str, Any]) -> list[Plot]:
    present = {
        factor: section[factor]
        for factor in _SPACES
        if section[factor] and section[factor]["pairs"]["similarity"] is not None
    }
    return [_similarity_matrices(present), _similarity_layers(present)] if present else []


@style()
def _similarity_matrices(present: dict[str, Any]) -> Plot:
    size = max(len(found["elements"]) for found in present.values())
    side = min(9.0, 1.8 + 0.42 * size)
    figure, axes = new_figure(0.8 + side * len(present), side, 1, len(present), squeeze=False)
    for ax, (factor, found) in zip(axes[0], present.items(), strict=True):
        elements = found["elements"]
        image = heat_map(ax, found["mean"], elements, elements, title=_SPACES[factor])
    figure.colorbar(image, ax=axes, label="similarity", shrink=0.8)
    means = "; ".join(
        f"{_SPACES[factor]}: {found['pairs']['similarity']:.3f} between pairs on average, chance "
        f"{found['pairs']['chance']:.3f}"
        for factor, found in present.items()
    )
    return Plot(
        "similarity",
        "Subspace similarity between adapters",
        f"Mean over all layers; 1 is the same subspace. {means[0].upper()}{means[1:]}.",
        figure,
    )


@style()
def _similarity_layers(present: dict[str, Any]) -> Plot:
    figure, axes = new_figure(3.6 * len(present), 2.8, 1, len(present), sharey=True, squeeze=False)
    for ax, (factor, found) in zip(axes[0], present.items(), strict=True):
        modules = list(dict.fromkeys(layer["module"] for layer in found["layers"]))
        names = short_names(modules)
        for index, module in enumerate(modules):
            pairs = [_pairs(layer) for layer in found["layers"] if layer["module"] == module]
            points = [point for point in pairs if point is not None]
            layer_line(ax, points, index % len(COLORS), names[module])
        chance_line(ax, found["pairs"]["chance"])
        ax.set_title(_SPACES[factor])
        ax.set_ylim(0.0, 1.03)
        layer_axis(ax)
    axes[0][0].set_ylabel("similarity")
    axes[0][-1].legend()
    return Plot(
        "similarity-layers",
        "Subspace similarity by layer",
        "Mean over all pairs in every layer; the band is one standard deviation over the pairs. The dotted line is the "
        "level of random subspaces.",
        figure,
    )


def _pairs(layer: dict[str, Any]) -> Point | None:
    """Mean and spread over the pairs of one layer."""
    matrix = layer["similarity"]
    values = [value for i in range(len(matrix)) for j in range(i) if (value := matrix[i][j]) is not None]
    if layer["layer"] is None or not values:
        return None
    return layer["layer"], statistics.fmean(values), statistics.pstdev(values)


@style()
def _drift_plot(label: str, drift: dict[str, Any]) -> list[Plot]:
    last = drift["stages"][-1] if drift["stages"] else None
    lines = [
        (change, factor)
        for change in drift["changes"]
        for factor in ("A", "B", "delta")
        if change["to"] == last and change["mean"][factor]["direction"] is not None
    ]
    if not lines:
        return []
    figure, axes = new_figure(7.2, 2.9, 1, 2)
    draw_drift(axes, lines)
    means = "; ".join(
        f"{'ΔW' if factor == 'delta' else factor} since {change['from']}: {change['mean'][factor]['direction']:.3f}"
        for change, factor in lines
    )
    return [
        Plot(
            f"drift-{slug(label)}",
            f"How far A, B and ΔW of {label} moved",
            f"Mean over the modules and experts of a layer. Change of direction over all layers: {means}.",
            figure,
        )
    ]
