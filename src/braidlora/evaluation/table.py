"""Scores as a plain-text table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, rules: Sequence[int] = ()
) -> str:
    """Align `rows` under `header`; columns whose cells are all numbers (or empty) are flush right, with one decimal.

    Args:
        header: one title per column.
        rows: cells; floats are shown with one decimal, None as a dash.
        rules: row numbers above which a line is drawn, besides the one below the header.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(header)}")
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]

    def line(values: Sequence[str]) -> str:
        aligned = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(header), rule]
    for number, row_cells in enumerate(cells):
        if number in rules:
            lines.append(rule)
        lines.append(line(row_cells))
    return "\n".join(lines)


def format_metrics(
    metrics: Mapping[str, Any], columns: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """A run's metrics as a table: one row per task, then the mean, and below it worst task, spread and Δm%.

    Args:
        metrics: what `metrics.json` holds: `tasks`, `mean`, `worst`, `std`, `delta_m` and its reason.
        columns: further scores to stand beside it, by title and task, e.g. `{"base": {...}, "majority": {...}}`; their
            means are added where a column has every task.
    """
    tasks: Mapping[str, Mapping[str, Any]] = metrics["tasks"]
    others = columns or {}
    unparsed = any(task.get("unparsed") for task in tasks.values())
    header = ["task", "metric", "n", "score", *others, *(["unparsed"] if unparsed else [])]
    rows: list[list[object]] = []
    for name, task in tasks.items():
        beside = [scores.get(name) for scores in others.values()]
        rows.append([name, task["metric"], task["n"], task["score"], *beside])
        if unparsed:
            rows[-1].append(task.get("unparsed", 0))
    rows.append(["mean", "", None, metrics["mean"], *(_mean(scores, tasks) for scores in others.values())])
    rows[-1][2] = sum(task["n"] for task in tasks.values())
    if unparsed:
        rows[-1].append(sum(task.get("unparsed", 0) for task in tasks.values()))
    lines = [format_table(header, rows, rules=[len(tasks)]), ""]
    if metrics["worst"] is not None:
        worst = metrics.get("worst_task") or min(tasks, key=lambda name: tasks[name]["score"])
        lines.append(
            f"worst task {worst} ({metrics['worst']:.1f}), spread over tasks (std) {metrics['std']:.1f}"
        )
    if metrics["delta_m"] is not None:
        lines.append(f"Δm% {metrics['delta_m']:+.2f} against single-task LoRA (lower is better)")
    elif metrics.get("delta_m_reason"):
        lines.append(f"Δm% not given: {metrics['delta_m_reason']}")
    if metrics.get("without_test_rows"):
        lines.append(f"not scored, for want of test rows: {', '.join(metrics['without_test_rows'])}")
    return "\n".join(lines)


def _mean(scores: Mapping[str, float], tasks: Mapping[str, Any]) -> float | None:
    if not tasks or any(name not in scores for name in tasks):
        return None
    return sum(scores[name] for name in tasks) / len(tasks)


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float))


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
