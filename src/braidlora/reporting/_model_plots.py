"""Figures of what needed the model: router weights and gradients."""

from __future__ import annotations

from typing import Any

from braidlora.reporting._axes import (
    WRITTEN,
    heat_map,
    layer_axis,
    layer_line,
    over_modules,
    short_names,
    slug,
)
from braidlora.reporting.plot import COLORS, HATCHES, Plot, new_figure

_WIDEST = 12.0  # inches; more experts go into a further line of panels


def router_plot(label: str, routers: dict[str, Any]) -> Plot:
    """One heat map per expert: layers down, tasks across."""
    layers, tasks, experts = routers["layers"], routers["tasks"], routers["experts"]
    names = short_names(list(dict.fromkeys(layer["module"] for layer in layers)))
    rows = [
        names[layer["module"]] if layer["layer"] is None else f"{layer['layer']} {names[layer['module']]}"
        for layer in layers
    ]
    # Cells without numbers may be as narrow as a name that stands aslant.
    panel = 0.5 + (0.32 if len(tasks) <= WRITTEN else 0.18) * len(tasks)
    columns = min(experts, max(1, int((_WIDEST - 1.6) / panel)))
    lines = -(-experts // columns)
    height = lines * min(12.0, 1.6 + 0.2 * len(rows))
    figure, grid = new_figure(1.6 + columns * panel, height, lines, columns, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[experts:]:
        unused.remove()
    for expert, ax in enumerate(axes[:experts]):
        weights = [[task[expert] for task in layer["weights"]] for layer in layers]
        image = heat_map(ax, weights, rows, tasks, title=f"expert {expert + 1}")
    figure.colorbar(image, ax=axes[:experts], label="mean router weight", shrink=0.8)
    mean = routers["mean"]
    distance = "" if mean["distance"] is None else (
        f" In {mean['layers_where_tasks_differ']} of {len(layers)} layers not all tasks prefer the same expert; their "
        f"mean weights lie {mean['distance']:.3f} apart (0 alike, 1 disjoint)."
    )  # fmt: skip
    return Plot(
        f"routers-{slug(label)}",
        f"Which expert serves which task in {label}",
        "Mean router weight over the tokens of a task's rows; an expert's number means nothing across layers."
        + distance,
        figure,
    )


def gradient_plots(label: str, gradients: dict[str, Any]) -> list[Plot]:
    """Cosines between tasks and norms, over all layers; and cosines by layer."""
    present = {
        factor: found for factor, found in gradients["factors"].items() if found["between"] is not None
    }
    if not present:
        return []
    return [_cosines(label, gradients, present), _by_layer(label, gradients, present)]


def _cosines(label: str, gradients: dict[str, Any], present: dict[str, Any]) -> Plot:
    tasks, of = gradients["tasks"], gradients["of"]
    side, rows = min(6.0, 1.9 + 0.32 * len(tasks)), -(-(len(present) + 1) // 2)
    figure, grid = new_figure(1.2 + 2 * side, rows * side, rows, 2, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[len(present) + 1 :]:
        unused.set_axis_off()
    norms = axes[len(present)]
    for ax, (factor, found) in zip(axes, present.items(), strict=False):
        shared = " (shared)" if factor in gradients["shared"] else ""
        image = heat_map(ax, found["cosine"], tasks, tasks, signed=True, title=f"{factor}{shared}")
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    width = 0.8 / len(present)
    for style, (factor, found) in enumerate(present.items()):
        places = [at + (style - (len(present) - 1) / 2) * width for at in range(len(tasks))]
        norms.bar(
            places,
            found["norm"],
            width,
            color=COLORS[style],
            hatch=HATCHES[style],
            edgecolor="white",
            label=factor,
        )
    norms.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
    norms.set_title("norm of the gradient")
    norms.legend(fontsize=7)
    said = "; ".join(
        f"{factor}: {found['between']:.2f} between {of}s, {found['within']:.2f} within one"
        for factor, found in present.items()
    )
    return Plot(
        f"gradients-{slug(label)}",
        f"Do the {of}s pull {label} the same way",
        f"Cosine between the {of}s' gradients over all layers (−1 opposed, 1 the same way); the diagonal is the "
        f"agreement of two halves of one {of}'s rows. {said}.",
        figure,
    )


def _by_layer(label: str, gradients: dict[str, Any], present: dict[str, Any]) -> Plot:
    of = gradients["of"]
    names = {"between": f"between {of}s", "within": f"within a {of}"}
    figure, axes = new_figure(2.9 * len(present), 2.7, 1, len(present), sharey=True, squeeze=False)
    for ax, (factor, found) in zip(axes[0], present.items(), strict=True):
        for style, (quantity, name) in enumerate(names.items()):
            points = [
                (number, sum(values) / len(values), 0.0)
                for number, entries in over_modules(found["layers"]).items()
                if (values := [entry[quantity] for entry in entries if entry[quantity] is not None])
            ]
            layer_line(ax, points, style, name)
        ax.axhline(0.0, color="#555555", linewidth=0.8)
        ax.set_title(f"{factor} (shared)" if factor in gradients["shared"] else factor)
        layer_axis(ax)
    axes[0][0].set_ylabel("cosine")
    axes[0][-1].legend(fontsize=7)
    return Plot(
        f"gradients-layers-{slug(label)}",
        f"Agreement of gradients by layer in {label}",
        f"Mean cosine between the gradients of different {of}s, and between two halves of one {of}'s rows.",
        figure,
    )
