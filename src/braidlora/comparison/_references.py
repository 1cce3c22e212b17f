"""What the rows are shown next to: single-task LoRAs, the untrained base model, and the most frequent answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.comparison._cells import Cell
from braidlora.comparison.statistics import summary
from braidlora.evaluation.scoring import majority_scores
from braidlora.tasks import Task


@dataclass(frozen=True)
class References:
    """Scores of single-task LoRAs by seed and task; if there are none, the reason."""

    scores: Mapping[int, Mapping[str, float]]
    entry: dict[str, Any]


def trained_references(
    singles: Mapping[str, Mapping[int, Cell]], seeds: Sequence[int], tuned: Mapping[str, Any], directory: Path
) -> References:
    """From the runs of single-task LoRAs, by task and seed; a failed run has no score."""
    found = {
        seed: {
            task: float(cells[seed].metrics()["tasks"][task]["score"])
            for task, cells in singles.items()
            if cells[seed].is_done()
        }
        for seed in seeds
    }
    entry = {
        "runs": {
            task: [cell.run.path.relative_to(directory).as_posix() for cell in cells.values()]
            for task, cells in singles.items()
        },
        "scores": {task: summary([found[seed].get(task) for seed in seeds]) for task in singles},
        "tuned": dict(tuned) or None,
        "reason": None,
    }
    return References(found, entry)


def given_references(scores: Mapping[str, float], seeds: Sequence[int]) -> References:
    """From the recipe's `evaluation.references`: the same numbers for every seed."""
    shown = {
        task: {"mean": score, "std_seeds": None, "values": [score] * len(seeds)}
        for task, score in scores.items()
    }
    entry = {"runs": None, "scores": shown, "tuned": None, "reason": None}
    return References({seed: dict(scores) for seed in seeds}, entry)


def no_references(reason: str) -> References:
    """Without scores, for this reason."""
    return References({}, {"runs": None, "scores": None, "tuned": None, "reason": reason})


def base_entry(cell: Cell | None, failures: Mapping[str, str]) -> dict[str, Any]:
    """`base` and `base_reason`: the base model's scores, or why there are none."""
    if cell is None:
        return {
            "base": None,
            "base_reason": "a classifier's head is new, so the base model alone has no answers",
        }
    if cell.name in failures:
        return {"base": None, "base_reason": failures[cell.name]}
    metrics = cell.metrics()
    scores = {name: task["score"] for name, task in metrics["tasks"].items()}
    return {"base": {"tasks": scores, "mean": metrics["mean"]}, "base_reason": None}


def majority_entry(tasks: Sequence[Task]) -> dict[str, Any]:
    """`majority` and `majority_reason`: what the most frequent training answer scores on the test rows."""
    scored = [task for task in tasks if task.test]
    scores = majority_scores(scored)
    without = [task.name for task in scored if task.name not in scores]
    mean = None if without else sum(scores.values()) / len(scores)
    reason = f"no training rows with an answer: {', '.join(without)}" if without else None
    return {"majority": {"tasks": scores, "mean": mean}, "majority_reason": reason}
