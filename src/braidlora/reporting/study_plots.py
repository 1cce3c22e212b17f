"""The study's figures: the paper's two (similarity by layer, drift by layer), and the matrix of all runs."""

from __future__ import annotations

import statistics
from typing import Any

from braidlora.reporting.heat_map import heat_map
from braidlora.reporting.layer_axes import (
    chance_line,
    draw_drift,
    layer_axis,
    layer_line,
    layer_points,
    short_names,
)
from braidlora.reporting.plot import Plot, new_figure, style

_GROUPS = {
    "different_tasks_same_seed": "different tasks, same seed",
    "same_task_different_seeds": "same task, different seeds",
    "different_tasks_different_seeds": "different tasks, different seeds",
}
_LINES = (("since_start", "A"), ("since_warmup", "A"), ("since_warmup", "B"), ("since_warmup", "delta"))
_MOST_PANELS = 4


def study_plots(study: dict[str, Any]) -> list[Plot]:
    """Similarity and drift by layer, and similarity between all runs."""
    plots = [_similarity(study)]
    if study["drift"]["since_start"] is not None:
        plots.append(_drift(study))
    return [*plots, _matrix(study)]


@style()
def _similarity(study: dict[str, Any]) -> Plot:
    modules = list(dict.fromkeys(layer["module"] for layer in study["end"]["A"]["layers"]))
    names = short_names(modules)
    # Many modules would make panels too small to read: their mean is drawn.
    panels: dict[str, list[str]] = (
        {names[module]: [module] for module in modules}
        if len(modules) <= _MOST_PANELS
        else {f"mean of {len(modules)} modules": modules}
    )
    figure, axes = new_figure(
        max(4.2, 2.9 * len(panels)), 5.2, 2, len(panels), sharex=True, sharey=True, squeeze=False
    )
    for row, factor in zip(axes, ("A", "B"), strict=True):
        for ax, (title, members) in zip(row, panels.items(), strict=True):
            chosen = [layer for layer in study["end"][factor]["layers"] if layer["module"] in members]
            for index, (group, name) in enumerate(_GROUPS.items()):
                points = layer_points(chosen, "groups", group)
                layer_line(ax, points, index, name)
            known = [layer["chance"] for layer in chosen if layer["chance"] is not None]
            chance_line(ax, statistics.fmean(known) if known else None)
            ax.set_title(f"{factor}, {title}")
            ax.set_ylim(0.0, 1.03)
        row[0].set_ylabel("subspace similarity")
    for ax in axes[-1]:
        layer_axis(ax)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return Plot(
        "study-similarity",
        "What makes A's and B's similar: task or seed?",
        study["verdict"]["alike_by_seed"]["text"],
        figure,
    )


@style()
def _drift(study: dict[str, Any]) -> Plot:
    drift = study["drift"]
    figure, axes = new_figure(7.2, 3.0, 1, 2)
    draw_drift(axes, [(drift[since], factor) for since, factor in _LINES if drift[since] is not None])
    return Plot(
        "study-drift",
        "How far A, B and ΔW move during training",
        "Mean over runs and modules; the band is one standard deviation over the runs. "
        + study["verdict"]["b_takes_the_direction"]["text"],
        figure,
    )


@style()
def _matrix(study: dict[str, Any]) -> Plot:
    elements = study["end"]["A"]["elements"]
    side = min(9.0, 1.9 + 0.4 * len(elements))
    figure, axes = new_figure(0.8 + 2 * side, side, 1, 2)
    for ax, factor in zip(axes, ("A", "B"), strict=True):
        mean = study["end"][factor]["mean"]
        image = heat_map(ax, mean, elements, elements, title=f"{factor}, mean over layers")
    figure.colorbar(image, ax=list(axes), label="subspace similarity", shrink=0.8)
    return Plot(
        "study-matrix",
        "Similarity between all runs",
        "Every run against every other, mean over all layers. Blocks along the diagonal would show tasks, stripes "
        "parallel to it seeds.",
        figure,
    )
