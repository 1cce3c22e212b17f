"""Figures of a comparison: difference to the baseline over all tasks and by task, scores by task, sweep curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from braidlora.reporting.comparison_tables import (
    BASE,
    MAJORITY,
    REFERENCE,
    baseline_label,
    percent,
    yardsticks,
)
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
from braidlora.reporting.tables import mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_YARDSTICK_LINES = {REFERENCE: "solid", BASE: "dotted", MAJORITY: "dashed"}
_INK, _PALE = "#222222", "#8a8a8a"


def difference_plot(comparison: Mapping[str, Any]) -> Plot | None:
    """Mean over tasks minus the baseline's: interval and single seeds; None where no method has a difference."""
    compared = _compared(comparison)
    if not compared:
        return None
    baseline = baseline_label(comparison)
    with style():
        figure, axes = new_figure(GRID_WIDTH * 0.75, 0.42 * len(compared) + 0.9)
        colors = [COLORS[index % len(COLORS)] for index, _ in compared]
        _draw_intervals(axes, [row["difference"] for _, row in compared], colors)
        for place, (_, row) in enumerate(compared):
            values = [value for value in row["difference"]["values"] if value is not None]
            axes.plot(values, [place + 0.24] * len(values), "|", color=_INK, markersize=5)
        name_rows([axes], [row["label"] for _, row in compared])
        axes.set_xlabel(f"Points above {plain(baseline)}, mean over tasks")
    told = [
        f"{side} {'; '.join(labels)}"
        for sign, side in (
            ("above", f"Seen above {baseline}:"),
            ("below", f"Seen below {baseline}:"),
            ("", f"Not told apart from {baseline}:"),
        )
        if (labels := [row["label"] for _, row in compared if mark(row["difference"]) == sign])
    ]
    return Plot(
        "difference",
        f"Difference to {baseline}",
        f"{'. '.join(told)}. Bars are {percent(comparison)} intervals; where one does not touch 0 its dot is filled. "
        "Ticks under a bar are single seeds.",
        figure,
    )


def task_difference_plot(comparison: Mapping[str, Any]) -> Plot | None:
    """The difference of every task, one panel per method; None where no method has one, or there is one task."""
    compared = [(index, row) for index, row in _compared(comparison) if row["difference"]["tasks"]]
    tasks = list(comparison["tasks"])
    if not compared or len(tasks) == 1:
        return None
    baseline = baseline_label(comparison)
    with style():
        height = rows_height(tasks) + 0.55
        figure, panels = panel_grid(len(compared), panel_height=height, margin=0.3, sharey=True, sharex=True)
        for panel, (index, row) in zip(panels, compared, strict=True):
            by_task = row["difference"]["tasks"]
            color = COLORS[index % len(COLORS)]
            _draw_intervals(panel, [by_task.get(task) for task in tasks], [color] * len(tasks))
            panel.set_title(wrapped(row["label"], 24), fontsize=9, loc="left")
        name_rows(panels, tasks)
        figure.supxlabel(f"Points above {plain(baseline)}", fontsize=9)
    seen = []
    for _, row in compared:
        marks = [mark(difference) for difference in row["difference"]["tasks"].values()]
        seen.append(f"{row['label']} above on {marks.count('above')}, below on {marks.count('below')}")
    return Plot(
        "task-differences",
        f"Difference to {baseline} by task",
        f"Of {len(tasks)} tasks, seen above or below {baseline}: {'; '.join(seen)}. One panel per method; dots are "
        f"filled where the {percent(comparison)} interval excludes 0.",
        figure,
    )


def task_plot(comparison: Mapping[str, Any]) -> Plot:
    """Score of every task: one panel per task, one bar per method, single seeds as dots, yardsticks as lines."""
    methods, others = comparison["rows"], yardsticks(comparison)
    colors = [COLORS[place % len(COLORS)] for place in range(len(methods))]
    with style():
        height = rows_height([row["label"] for row in methods]) + 0.55
        figure, panels = panel_grid(
            len(comparison["tasks"]), panel_height=height, margin=0.6, sharey=True, sharex=True
        )
        for panel, task in zip(panels, comparison["tasks"], strict=True):
            _draw_bars(panel, [row["tasks"].get(task) for row in methods], colors)
            for name, scores in others.items():
                if (score := scores.get(task)) is not None:
                    panel.axvline(score, color=_INK, linewidth=1.0, linestyle=_YARDSTICK_LINES[name])
            panel.set_title(wrapped(task, 24), fontsize=9, loc="left")
            panel.set_xlim(0, _upper(comparison))
        name_rows(panels, [row["label"] for row in methods])
        figure.supxlabel("Score", fontsize=9)
        if others:
            _yardstick_legend(figure, others)
    lines = "".join(f" {name}: {_YARDSTICK_LINES[name]} line." for name in others)
    marks = (
        " Bars are means over seeds, whiskers one standard deviation, dots single seeds."
        if len(comparison["seeds"]) > 1
        else ""
    )
    return Plot(
        "scores",
        "Score of every task, as bars",
        f"One panel per task, one bar per method.{marks}{lines}",
        figure,
    )


def sweep_plot(comparison: Mapping[str, Any]) -> Plot | None:
    """Mean score and worst task over the swept values, one line per method; None where nothing was swept.

    A row that the sweep left alone, such as LoRA in a sweep of the number of experts, is a level line.
    """
    sweep = comparison["sweep"]
    if sweep is None:
        return None
    key, values = sweep["key"], sweep["values"]
    families: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in comparison["rows"]:
        if key in row["overrides"]:
            family = row["label"].split(f", {key.rsplit('.', 1)[-1]} = ")[0]
            families.setdefault(family, {})[values.index(row["overrides"][key])] = row
        else:
            families[row["label"]] = dict.fromkeys(range(len(values)), row)
    with style():
        figure, panels = new_figure(GRID_WIDTH * 0.75, 2.6, 1, 2, sharey=True)
        for panel, what, title in zip(
            panels, ("mean", "worst"), ("Mean over tasks", "Worst task"), strict=True
        ):
            for index, rows in enumerate(families.values()):
                _draw_sweep(panel, index, {place: row[what] for place, row in sorted(rows.items())})
            panel.set_title(title, fontsize=9, loc="left")
            panel.set_xticks(range(len(values)), [plain(str(value)) for value in values])
        panels[0].set_ylabel("Score")
        figure.supxlabel(plain(key), fontsize=9)
        if len(families) > 1:
            legend(figure, list(families))
    matched = {
        "none": "nothing else changes",
        "parameters": "the rank keeps the number of trained parameters alike",
        "rank": "the rank keeps the rank of all experts together alike",
    }[sweep["matched"]]
    return Plot(
        "sweep",
        f"Score over {key}",
        f"Mean over tasks and worst task for {key} = {', '.join(map(str, values))}; {matched}. Whiskers are one "
        "standard deviation over seeds.",
        figure,
    )


def _compared(comparison: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """Rows with a known difference, with their numbers in the whole table, which give them their colours."""
    return [
        (index, row)
        for index, row in enumerate(comparison["rows"])
        if row["difference"] is not None and row["difference"]["mean"] is not None
    ]


def _draw_intervals(
    axes: Axes, differences: Sequence[Mapping[str, Any] | None], colors: Sequence[str]
) -> None:
    """One line per difference, the first on top; the dot is filled where the interval excludes 0."""
    known = [
        (place, difference, color)
        for place, (difference, color) in enumerate(zip(differences, colors, strict=True))
        if difference is not None and difference["mean"] is not None
    ]
    bounded = [entry for entry in known if entry[1]["low"] is not None and entry[1]["high"] is not None]
    axes.hlines(
        [place for place, _, _ in bounded],
        [difference["low"] for _, difference, _ in bounded],
        [difference["high"] for _, difference, _ in bounded],
        colors=[color for _, _, color in bounded],
        linewidth=2.2,
    )
    axes.scatter(
        [difference["mean"] for _, difference, _ in known],
        [place for place, _, _ in known],
        s=26,
        color=[color if mark(difference) else "white" for _, difference, color in known],
        edgecolors=[color for _, _, color in known],
        zorder=3,
    )
    axes.axvline(0, color=_INK, linewidth=0.8, zorder=1)
    axes.spines["left"].set_visible(False)


def _draw_bars(axes: Axes, scores: Sequence[Mapping[str, Any] | None], colors: Sequence[str]) -> None:
    """One bar per score, the first on top, with whiskers and seeds."""
    known = [
        (place, score, color)
        for place, (score, color) in enumerate(zip(scores, colors, strict=True))
        if score is not None and score["mean"] is not None
    ]
    means = [score["mean"] for _, score, _ in known]
    places = [place for place, _, _ in known]
    axes.barh(places, means, height=0.66, color=[color for _, _, color in known], alpha=0.55, linewidth=0)
    for place in set(range(len(scores))) - set(places):
        axes.text(0, place, " not scored", va="center", fontsize=7, color=_PALE)
    spreads = [score["std_seeds"] or 0.0 for _, score, _ in known]
    if any(spreads):
        axes.errorbar(means, places, xerr=spreads, fmt="none", ecolor=_INK, elinewidth=0.9, capsize=2)
    seeds = [
        (value, place, color)
        for place, score, color in known
        for value in score["values"]
        if value is not None and len(score["values"]) > 1
    ]
    if seeds:
        values, heights, shades = zip(*seeds, strict=True)
        axes.scatter(values, heights, s=9, color=shades, edgecolors=_INK, linewidths=0.5, zorder=3)


def _draw_sweep(axes: Axes, index: int, scores: Mapping[int, Mapping[str, Any] | None]) -> None:
    known = {
        place: score for place, score in scores.items() if score is not None and score["mean"] is not None
    }
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
    """Where the score axis ends: 100, or the next round number above the highest score where all are low."""
    scores = [
        value
        for row in comparison["rows"]
        for score in row["tasks"].values()
        if score is not None
        for value in (score["mean"], *score["values"])
        if value is not None
    ]
    scores += [
        score for column in yardsticks(comparison).values() for score in column.values() if score is not None
    ]
    highest = max(scores, default=100.0)
    return next((limit for limit in (10.0, 25.0, 50.0) if highest < 0.9 * limit), 100.0)


def _yardstick_legend(figure: Any, names: Sequence[str] | Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_INK, linewidth=1.0, linestyle=_YARDSTICK_LINES[name]) for name in names]
    figure.legend(handles, list(names), loc="outside upper left", ncols=len(handles), frameon=False)
