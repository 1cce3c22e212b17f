"""Figures of what needs the model: router weights and gradients."""

from __future__ import annotations

from typing import Any

from braidlora.reporting.heat_map import WRITTEN, heat_map
from braidlora.reporting.layer_axes import layer_axis, layer_line, layer_points, short_names, slug
from braidlora.reporting.panels import used_panels
from braidlora.reporting.plot import COLORS, HATCHES, Plot, new_figure, style

_WIDEST = 12.0  # inches; more experts continue on another line of panels


@style()
def router_plot(label: str, routers: dict[str, Any]) -> Plot:
    """One heat map per expert: layers down, tasks across."""
    layers, tasks, experts = routers["layers"], routers["tasks"], routers["experts"]
    names = short_names(list(dict.fromkeys(layer["module"] for layer in layers)))
    rows = [
        names[layer["module"]] if layer["layer"] is None else f"{layer['layer']} {names[layer['module']]}"
        for layer in layers
    ]
    # Cells without numbers may be as narrow as a slanted name.
    width = 0.5 + (0.32 if len(tasks) <= WRITTEN else 0.18) * len(tasks)
    columns = min(experts, max(1, int((_WIDEST - 1.6) / width)))
    lines = -(-experts // columns)
    height = lines * min(12.0, 1.6 + 0.2 * len(rows))
    figure, grid = new_figure(1.6 + columns * width, height, lines, columns, sharey=True, squeeze=False)
    panels = used_panels(grid, experts)
    for expert, panel in enumerate(panels):
        weights = [[task[expert] for task in layer["weights"]] for layer in layers]
        image = heat_map(panel, weights, rows, tasks, title=f"expert {expert + 1}")
    figure.colorbar(image, ax=panels, label="mean router weight", shrink=0.8)
    mean = routers["mean"]
    distance = "" if mean["distance"] is None else (
        f" In {mean['layers_where_tasks_differ']} of {len(layers)} layers the tasks do not all prefer the same expert; "
        f"the distance between their mean weights is {mean['distance']:.3f} (0 identical, 1 disjoint)."
    )  # fmt: skip
    return Plot(
        f"routers-{slug(label)}",
        f"Which expert serves which task in {label}",
        "Mean router weight over the tokens of a task's rows. Expert numbers of different layers are unrelated."
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
    titles = {factor: f"{factor} (shared)" if factor in gradients["shared"] else factor for factor in present}
    return [_cosines(label, gradients, present, titles), _by_layer(label, gradients["of"], present, titles)]


@style()
def _cosines(label: str, gradients: dict[str, Any], present: dict[str, Any], titles: dict[str, str]) -> Plot:
    tasks, of = gradients["tasks"], gradients["of"]
    side, rows = min(6.0, 1.9 + 0.32 * len(tasks)), -(-(len(present) + 1) // 2)
    figure, grid = new_figure(1.2 + 2 * side, rows * side, rows, 2, squeeze=False)
    *panels, norms = used_panels(grid, len(present) + 1)
    for panel, (factor, found) in zip(panels, present.items(), strict=True):
        image = heat_map(panel, found["cosine"], tasks, tasks, limits=(-1.0, 1.0), title=titles[factor])
    figure.colorbar(image, ax=[*panels, norms], label="cosine", shrink=0.8)
    width = 0.8 / len(present)
    for index, (factor, found) in enumerate(present.items()):
        places = [at + (index - (len(present) - 1) / 2) * width for at in range(len(tasks))]
        norms.bar(
            places, found["norm"], width, color=COLORS[index], hatch=HATCHES[index], edgecolor="white",
            label=factor,
        )  # fmt: skip
    norms.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", rotation_mode="anchor")
    norms.set_title("norm of the gradient")
    norms.legend()
    means = "; ".join(
        f"{factor}: {found['between']:.2f} between {of}s, {found['within']:.2f} within one"
        for factor, found in present.items()
    )
    return Plot(
        f"gradients-{slug(label)}",
        f"Do the {of}s pull {label} in the same direction?",
        f"Cosine between the {of}s' gradients over all layers (−1 opposed, 1 the same direction); the diagonal is the "
        f"agreement of the two halves of one {of}'s rows. {means}.",
        figure,
    )


@style()
def _by_layer(label: str, of: str, present: dict[str, Any], titles: dict[str, str]) -> Plot:
    figure, axes = new_figure(2.9 * len(present), 2.7, 1, len(present), sharey=True, squeeze=False)
    for panel, (factor, found) in zip(axes[0], present.items(), strict=True):
        for index, (quantity, name) in enumerate(
            (("between", f"between {of}s"), ("within", f"within a {of}"))
        ):
            points = layer_points(found["layers"], quantity)
            layer_line(panel, points, index, name)
        panel.axhline(0.0, color="#555555", linewidth=0.8)
        panel.set_title(titles[factor])
        layer_axis(panel)
    axes[0][0].set_ylabel("cosine")
    axes[0][-1].legend()
    return Plot(
        f"gradients-layers-{slug(label)}",
        f"Agreement of gradients by layer in {label}",
        f"Mean cosine between the gradients of different {of}s, and between the two halves of one {of}'s rows.",
        figure,
    )
