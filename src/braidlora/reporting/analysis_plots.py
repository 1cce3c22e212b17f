"""The figures of `braidlora analyze`, from the numbers of its `analysis.json` alone."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import Any

from braidlora.reporting._axes import (
    Point,
    chance_line,
    drift_axes,
    heat_map,
    layer_axis,
    layer_line,
    over_modules,
    short_names,
    since,
    slug,
)
from braidlora.reporting._model_plots import gradient_plots, router_plot
from braidlora.reporting._study_plots import study_plots
from braidlora.reporting.plot import COLORS, Plot, new_figure

SPACES = {"A": "row spaces of A", "B": "column spaces of B"}
_LINES = len(COLORS)


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
    return _named_apart(plots)


def _named_apart(plots: list[Plot]) -> list[Plot]:
    """Labels such as `a b` and `a-b` would give two plots one name, and the later one the file of both."""
    names: list[str] = []
    for plot in plots:
        tries = (plot.name if number == 1 else f"{plot.name}-{number}" for number in itertools.count(1))
        names.append(next(name for name in tries if name not in names))
    return [dataclasses.replace(plot, name=name) for plot, name in zip(plots, names, strict=True)]


def _similarity_plots(section: dict[str, Any]) -> list[Plot]:
    factors = [
        factor for factor in SPACES if section[factor] and section[factor]["pairs"]["similarity"] is not None
    ]
    if not factors:
        return []
    return [_similarity_matrices(section, factors), _similarity_layers(section, factors)]


def _similarity_matrices(section: dict[str, Any], factors: list[str]) -> Plot:
    size = max(len(section[factor]["elements"]) for factor in factors)
    side = min(9.0, 1.8 + 0.42 * size)
    figure, axes = new_figure(0.8 + side * len(factors), side, 1, len(factors), squeeze=False)
    for factor, ax in zip(factors, axes[0], strict=True):
        found = section[factor]
        image = heat_map(ax, found["mean"], found["elements"], found["elements"], title=SPACES[factor])
    figure.colorbar(image, ax=axes, label="similarity", shrink=0.8)
    said = "; ".join(
        f"{SPACES[factor]}: {section[factor]['pairs']['similarity']:.3f} between pairs on average, chance "
        f"{section[factor]['pairs']['chance']:.3f}"
        for factor in factors
    )
    return Plot(
        "similarity",
        "Subspace similarity between adapters",
        f"Mean over all layers; 1 is the same subspace. {said[0].upper()}{said[1:]}.",
        figure,
    )


def _similarity_layers(section: dict[str, Any], factors: list[str]) -> Plot:
    figure, axes = new_figure(3.6 * len(factors), 2.8, 1, len(factors), sharey=True, squeeze=False)
    for factor, ax in zip(factors, axes[0], strict=True):
        layers = section[factor]["layers"]
        modules = list(dict.fromkeys(layer["module"] for layer in layers))
        names = short_names(modules)
        for style, module in enumerate(modules):
            points = [
                point
                for layer in layers
                if layer["module"] == module and (point := _pairs(layer)) is not None
            ]
            layer_line(ax, points, style % _LINES, names[module])
        chance_line(ax, section[factor]["pairs"]["chance"])
        ax.set_title(SPACES[factor])
        ax.set_ylim(0.0, 1.03)
        layer_axis(ax)
    axes[0][0].set_ylabel("similarity")
    axes[0][-1].legend(fontsize=7)
    return Plot(
        "similarity-layers",
        "Subspace similarity by layer",
        "Mean over all pairs in every layer, the band one standard deviation of the pairs; the dotted line is what "
        "random subspaces give.",
        figure,
    )  # fmt: skip


def _pairs(layer: dict[str, Any]) -> Point | None:
    """Mean and spread over the pairs of one layer."""
    matrix = layer["similarity"]
    values = [value for i in range(len(matrix)) for j in range(i) if (value := matrix[i][j]) is not None]
    if layer["layer"] is None or not values:
        return None
    return layer["layer"], statistics.fmean(values), statistics.pstdev(values)


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
    for ax, quantity in zip(axes, ("magnitude", "direction"), strict=True):
        for style, (change, factor) in enumerate(lines):
            points = [
                (number, statistics.fmean(values), 0.0)
                for number, entries in over_modules(change["layers"]).items()
                if (values := [c[quantity] for e in entries for c in e[factor] if c[quantity] is not None])
            ]
            layer_line(ax, points, style, since(factor, change["from"]))
        layer_axis(ax)
    drift_axes(axes)
    said = "; ".join(
        f"{'ΔW' if factor == 'delta' else factor} since {change['from']}: {change['mean'][factor]['direction']:.3f}"
        for change, factor in lines
    )
    return [
        Plot(
            f"drift-{slug(label)}",
            f"How far A, B and ΔW of {label} moved",
            f"Mean over modules and experts of a layer. Change of direction over all layers: {said}.",
            figure,
        )
    ]
