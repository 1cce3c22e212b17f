"""Loss curves per task from the runs' `log.jsonl`: mean over seeds with a band of one standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError
from braidlora.reporting.method_colors import method_styles
from braidlora.reporting.panels import band, integer_ticks, legend, line_style, panel_grid, wrapped
from braidlora.reporting.plot import Plot, style
from braidlora.runs import RunDirectory, read_jsonl

_BINS = 60  # more points than a small panel can show only make the page heavy

Curve = list[tuple[int, float]]


def loss_plots(comparison: Mapping[str, Any], directory: Path) -> list[Plot]:
    """Training loss, and validation loss if it was measured, as one small panel per task.

    Args:
        comparison: what `comparison.json` holds.
        directory: the folder that its runs' paths are relative to. Runs whose log is gone are left out.

    Raises:
        CheckpointError: a log is damaged.
    """
    plots = []
    for name, key, title in (
        ("training-loss", "tasks", "Training loss"),
        ("validation-loss", "validation_tasks", "Validation loss"),
    ):
        curves = {
            row["label"]: [read_losses(RunDirectory(directory / run).log, key) for run in row["runs"]]
            for row in comparison["rows"]
        }
        if any(curve for runs in curves.values() for run in runs for curve in run.values()):
            styles = method_styles(comparison["rows"])
            plots.append(draw_losses(name, title, list(comparison["tasks"]), curves, styles))
    return plots


def read_losses(log: Path, key: str = "tasks") -> dict[str, Curve]:
    """`(step, loss)` by task from a run's log; empty if there is no log.

    Args:
        log: a run's `log.jsonl`.
        key: `tasks` for training lines, `validation_tasks` for validation lines.

    Raises:
        CheckpointError: a line is not JSON.
    """
    try:
        lines = read_jsonl(log) if log.is_file() else []
    except CheckpointError as error:
        raise CheckpointError(f"{error} To draw the report without this run's losses, remove it.") from None
    curves: dict[str, Curve] = {}
    for line in lines:
        for task, loss in line.get(key, {}).items():
            curves.setdefault(task, []).append((line["step"], loss))
    return curves


def average(curves: Sequence[Curve], bins: int = _BINS) -> list[tuple[float, float, float]]:
    """Mean and standard deviation over seeds, on common steps.

    If more than `bins` steps were logged, neighboring steps are binned; a seed then counts with the mean of its losses
    in the bin. Seeds may have been logged at different steps.

    Args:
        curves: one per seed, none empty.
        bins: the most points to return.

    Returns:
        `(step, mean, std)` in order; std is 0 if only one seed has a loss.
    """
    logged = sorted({step for curve in curves for step, _ in curve})
    width = 1 if len(logged) <= bins else (logged[-1] - logged[0]) // bins + 1
    points: dict[int, list[Curve]] = {}
    for seed, curve in enumerate(curves):
        for step, loss in curve:
            point = points.setdefault((step - logged[0]) // width, [[] for _ in curves])
            point[seed].append((step, loss))
    averaged = []
    for _, seeds in sorted(points.items()):
        losses = [statistics.fmean(loss for _, loss in seed) for seed in seeds if seed]
        middle = statistics.fmean({step for seed in seeds for step, _ in seed})
        std = statistics.stdev(losses) if len(losses) > 1 else 0.0
        averaged.append((middle, statistics.fmean(losses), std))
    return averaged


@style()
def draw_losses(
    name: str, title: str, tasks: list[str], curves: dict[str, list[dict[str, Curve]]], styles: Sequence[int]
) -> Plot:
    """One panel per task, one line per entry of `curves`: by label, the curves of its runs, with its style."""
    figure, panels = panel_grid(len(tasks), panel_height=1.55)
    for task, panel in zip(tasks, panels, strict=True):
        for index, runs in zip(styles, curves.values(), strict=True):
            logged = [run[task] for run in runs if task in run]
            if not logged:
                continue
            steps, mean, std = (list(column) for column in zip(*average(logged), strict=True))
            look = line_style(index)
            panel.plot(steps, mean, marker="o" if len(steps) == 1 else "", markersize=3, **look)
            if len(logged) > 1:
                band(panel, steps, mean, std, look["color"])
        panel.set_title(wrapped(task, 24))
        panel.set_ylim(bottom=0)
        integer_ticks(panel)
    figure.supxlabel("Step")
    figure.supylabel("Loss")
    if len(curves) > 1:
        legend(figure, list(curves), styles)
    several = max(len(runs) for runs in curves.values()) > 1
    return Plot(
        name,
        f"{title} of every task",
        "Loss by training step, one panel per task"
        + (", one line per method" if len(curves) > 1 else "")
        + "; each panel has its own scale."
        + (" The band is one standard deviation over seeds." if several else ""),
        figure,
    )
