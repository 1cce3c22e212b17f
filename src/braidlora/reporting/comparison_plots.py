"""Figures of a comparison: difference from the baseline over all tasks and by task, scores by task, sweep curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from braidlora.reporting.comparison_tables import (
    BASE,
    MAJORITY,
    REFERENCE,
    baseline_label,
    percent,
    reference_scores,
)
from braidlora.reporting.method_colors import method_styles
from braidlora.reporting.panels import (
    COLORS,
    GRID_WIDTH,
    legend,
    line_style,
    name_rows,
    panel_grid,
    plain,
    rows_height,
    wrapped,
)
from braidlora.reporting.plot import MARKERS, Plot, new_figure, style
from braidlora.reporting.significance import mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REFERENCE_LINES = {REFERENCE: "solid", BASE: "dotted", MAJORITY: "dashed"}
_INK, _PALE = "#222222", "#8a8a8a"


@style()
def difference_plot(comparison: Mapping[str, Any]) -> Plot | None:
    """Mean over tasks minus the baseline's: interval and single seeds; None if no method has a difference."""
    compared = _compared(comparison)
    if not compared:
        return None
    baseline = baseline_label(comparison)
    figure, axes = new_figure(GRID_WIDTH * 0.75, 0.42 * len(compared) + 0.9)
    _draw_intervals(axes, [row["difference"] for _, row in compared], [color for color, _ in compared])
    for place, (_, row) in enumerate(compared):
        values = [value for value in row["difference"]["values"] if value is not None]
        axes.plot(values, [place + 0.24] * len(values), "|", color=_INK, markersize=5)
    name_rows([axes], [row["label"] for _, row in compared])
    axes.set_xlabel(f"Points above {plain(baseline)}, mean over tasks")
    found = [
        f"{words} {baseline}: {'; '.join(labels)}"
        for side, words in (
            ("above", "Significantly above"),
            ("below", "Significantly below"),
            ("", "Not significantly different from"),
        )
        if (labels := [row["label"] for _, row in compared if mark(row["difference"]) == side])
    ]
    return Plot(
        "difference",
        f"Difference from {baseline}",
        f"{'. '.join(found)}. Bars are {percent(comparison)} CIs; a dot is filled if its CI excludes 0. Ticks below a "
        "bar are single seeds.",
        figure,
    )


@style()
def task_difference_plot(comparison: Mapping[str, Any]) -> Plot | None:
    """The difference on every task, one panel per method; None if no method has one, or there is only one task."""
    compared = [(color, row) for color, row in _compared(comparison) if row["difference"]["tasks"]]
    tasks = list(comparison["tasks"])
    if not compared or len(tasks) == 1:
        return None
    baseline = baseline_label(comparison)
    height = rows_height(tasks) + 0.55
    figure, panels = panel_grid(len(compared), panel_height=height, margin=0.3, sharey=True, sharex=True)
    counts = []
    for panel, (color, row) in zip(panels, compared, strict=True):
        by_task = row["difference"]["tasks"]
        _draw_intervals(panel, [by_task.get(task) for task in tasks], [color] * len(tasks))
        panel.set_title(wrapped(row["label"], 24))
        marks = [mark(difference) for difference in by_task.values()]
        counts.append(f"{row['label']} above on {marks.count('above')}, below on {marks.count('below')}")
    name_rows(panels, tasks)
    figure.supxlabel(f"Points above {plain(baseline)}")
    return Plot(
        "task-differences",
        f"Difference from {baseline} by task",
        f"Of {len(tasks)} tasks, significantly above or below {baseline}: {'; '.join(counts)}. One panel per method; a "
        f"dot is filled if the {percent(comparison)} CI excludes 0.",
        figure,
    )


@style()
def task_plot(comparison: Mapping[str, Any]) -> Plot:
    """Score on every task: one panel per task, one bar per method, single seeds as dots, references as lines."""
    methods, references = comparison["rows"], reference_scores(comparison)
    labels, tasks = [row["label"] for row in methods], comparison["tasks"]
    height = rows_height(labels) + 0.55
    figure, panels = panel_grid(len(tasks), panel_height=height, margin=0.6, sharey=True, sharex=True)
    palette = [COLORS[index % len(COLORS)] for index in method_styles(methods)]
    for panel, task in zip(panels, tasks, strict=True):
        _draw_bars(panel, [row["tasks"].get(task) for row in methods], palette)
        for name, scores in references.items():
            if (score := scores.get(task)) is not None:
                panel.axvline(score, color=_INK, linewidth=1.0, linestyle=_REFERENCE_LINES[name])
        panel.set_title(wrapped(task, 24))
        panel.set_xlim(0, _upper(comparison))
    name_rows(panels, labels)
    figure.supxlabel("Score")
    if references:
        _reference_legend(figure, list(references))
    several = len(comparison["seeds"]) > 1
    marks = (
        " Bars are means over seeds, whiskers one standard deviation, dots single seeds." if several else ""
    )
    lines = "".join(f" {name}: {_REFERENCE_LINES[name]} line." for name in references)
    return Plot(
        "scores",
        "Score on every task",
        f"One panel per task, one bar per method.{marks}{lines}",
        figure,
    )


@style()
def sweep_plot(comparison: Mapping[str, Any]) -> Plot | None:
    """Mean score and worst task over the swept values, one line per method; None if nothing was swept.

    A row that was not swept, such as LoRA in a sweep of the number of experts, is a level line.
    """
    sweep = comparison["sweep"]
    if sweep is None:
        return None
    key, values = sweep["key"], sweep["values"]
    families: dict[str, dict[int, Mapping[str, Any]]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for row in comparison["rows"]:
        if key in row["overrides"]:
            family = row["label"].split(f", {key.rsplit('.', 1)[-1]} = ")[0]
            families.setdefault(family, {})[values.index(row["overrides"][key])] = row
        else:
            family = row["label"]
            families[family] = dict.fromkeys(range(len(values)), row)
        first.setdefault(family, row)
    styles = method_styles([{"name": row["name"].split("+")[0]} for row in first.values()])
    figure, panels = new_figure(GRID_WIDTH * 0.75, 2.6, 1, 2, sharey=True)
    for panel, what, title in zip(panels, ("mean", "worst"), ("Mean over tasks", "Worst task"), strict=True):
        for index, rows in zip(styles, families.values(), strict=True):
            _draw_sweep(panel, index, {place: row[what] for place, row in sorted(rows.items())})
        panel.set_title(title)
        panel.set_xticks(range(len(values)), [plain(str(value)) for value in values])
    panels[0].set_ylabel("Score")
    figure.supxlabel(plain(key))
    if len(families) > 1:
        legend(figure, list(families), styles)
    matched = {
        "none": "nothing else changes",
        "parameters": "the rank is set so that the number of trained parameters stays the same",
        "rank": "the rank is set so that the total rank of all experts stays the same",
    }[sweep["matched"]]
    return Plot(
        "sweep",
        f"Score by {key}",
        f"Mean over tasks and worst task for {key} = {', '.join(map(str, values))}; {matched}. Whiskers are one "
        "standard deviation over seeds.",
        figure,
    )


def _compared(comparison: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows with a known difference, with the colors that they have in all figures."""
    return [
        (COLORS[index % len(COLORS)], row)
        for index, row in zip(method_styles(comparison["rows"]), comparison["rows"], strict=True)
        if row["difference"] is not None and row["difference"]["mean"] is not None
    ]


def _known(statistics: Iterable[tuple[int, Mapping[str, Any] | None]]) -> dict[int, Mapping[str, Any]]:
    """Those with a mean, by their place."""
    return {place: one for place, one in statistics if one is not None and one["mean"] is not None}


def _draw_intervals(
    axes: Axes, differences: Sequence[Mapping[str, Any] | None], colors: Sequence[str]
) -> None:
    """One line per difference, the first on top; the dot is filled if the interval excludes 0."""
    known = _known(enumerate(differences))
    bounded = {
        place: one for place, one in known.items() if one["low"] is not None and one["high"] is not None
    }
    axes.hlines(
        list(bounded),
        [one["low"] for one in bounded.values()],
        [one["high"] for one in bounded.values()],
        colors=[colors[place] for place in bounded],
        linewidth=2.2,
    )
    axes.scatter(
        [one["mean"] for one in known.values()],
        list(known),
        s=26,
        color=[colors[place] if mark(one) else "white" for place, one in known.items()],
        edgecolors=[colors[place] for place in known],
        zorder=3,
    )
    axes.axvline(0, color=_INK, linewidth=0.8, zorder=1)
    axes.spines["left"].set_visible(False)


def _draw_bars(axes: Axes, scores: Sequence[Mapping[str, Any] | None], palette: Sequence[str]) -> None:
    """One bar per score, the first on top, with whiskers and seeds."""
    known = _known(enumerate(scores))
    means = [score["mean"] for score in known.values()]
    colors = {place: palette[place] for place in known}
    axes.barh(list(known), means, height=0.66, color=list(colors.values()), alpha=0.55, linewidth=0)
    for place in set(range(len(scores))) - set(known):
        axes.text(0, place, " not scored", va="center", fontsize=7, color=_PALE)
    spreads = [score["std_seeds"] or 0.0 for score in known.values()]
    if any(spreads):
        axes.errorbar(means, list(known), xerr=spreads, fmt="none", ecolor=_INK, elinewidth=0.9, capsize=2)
    seeds = [
        (value, place, colors[place])
        for place, score in known.items()
        for value in score["values"]
        if value is not None and len(score["values"]) > 1
    ]
    if seeds:
        values, heights, shades = zip(*seeds, strict=True)
        axes.scatter(values, heights, s=9, color=shades, edgecolors=_INK, linewidths=0.5, zorder=3)


def _draw_sweep(axes: Axes, index: int, scores: Mapping[int, Mapping[str, Any] | None]) -> None:
    known = _known(scores.items())
    axes.errorbar(
        list(known),
        [score["mean"] for score in known.values()],
        yerr=[score["std_seeds"] or 0.0 for score in known.values()],
        marker=MARKERS[index % len(MARKERS)],
        markersize=5,
        capsize=3,
        elinewidth=1.0,
        **line_style(index),
    )


def _upper(comparison: Mapping[str, Any]) -> float:
    """Where the score axis ends: 100, or the next round number above the highest score if all are low."""
    scores = [
        value
        for row in comparison["rows"]
        for score in row["tasks"].values()
        if score is not None
        for value in (score["mean"], *score["values"])
    ]
    scores += [score for by_task in reference_scores(comparison).values() for score in by_task.values()]
    highest = max((score for score in scores if score is not None), default=100.0)
    return next((limit for limit in (10.0, 25.0, 50.0) if highest < 0.9 * limit), 100.0)


def _reference_legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_INK, linewidth=1.0, linestyle=_REFERENCE_LINES[name]) for name in names]
    figure.legend(handles, names, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
