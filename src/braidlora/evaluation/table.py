"""A run's metrics as a plain-text table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braidlora.tables import text_table


def format_metrics(
    metrics: Mapping[str, Any], columns: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """A run's metrics as a table: one row per task, then the mean, and below it worst task, spread and Δm%.

    With one task, worst task and spread say nothing new, and why there is no Δm% is of no interest.

    Args:
        metrics: what `metrics.json` holds: `tasks`, `mean`, `worst`, `std`, `delta_m` and its reason.
        columns: scores to compare with, by title and task, e.g. `{"base": {...}, "majority": {...}}`; a column that has
            every task gets a mean.
    """
    tasks: Mapping[str, Mapping[str, Any]] = metrics["tasks"]
    others = columns or {}
    unparsed = any(task.get("unparsed") for task in tasks.values())
    header = ["task", "metric", "n", "score", *others, *(["unparsed"] if unparsed else [])]
    rows: list[list[object]] = []
    for name, task in tasks.items():
        compared = [scores.get(name) for scores in others.values()]
        rows.append([name, task["metric"], task["n"], task["score"], *compared])
        if unparsed:
            rows[-1].append(task.get("unparsed", 0))
    rows.append(["mean", "", None, metrics["mean"], *(_mean(scores, tasks) for scores in others.values())])
    rows[-1][2] = sum(task["n"] for task in tasks.values())
    if unparsed:
        rows[-1].append(sum(task.get("unparsed", 0) for task in tasks.values()))
    lines = [text_table(header, rows, left=(0, 1), rules=[len(tasks)]), ""]
    if metrics["worst"] is not None and len(tasks) > 1:
        worst = metrics.get("worst_task") or min(tasks, key=lambda name: tasks[name]["score"])
        lines.append(
            f"worst task {worst} ({metrics['worst']:.1f}), spread over tasks (std) {metrics['std']:.1f}"
        )
    if metrics["delta_m"] is not None:
        lines.append(f"Δm% {metrics['delta_m']:+.2f} relative to single-task LoRA (lower is better)")
    elif metrics.get("delta_m_reason") and len(tasks) > 1:
        lines.append(f"Δm% not available: {metrics['delta_m_reason']}")
    if metrics.get("without_test_rows"):
        lines.append(f"not scored, because there are no test rows: {', '.join(metrics['without_test_rows'])}")
    return "\n".join(lines)


def _mean(scores: Mapping[str, float], tasks: Mapping[str, Any]) -> float | None:
    if not tasks or any(name not in scores for name in tasks):
        return None
    return sum(scores[name] for name in tasks) / len(tasks)
