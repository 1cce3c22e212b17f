"""From finished runs to the numbers of a comparison: means over seeds, Δm%, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from braidlora.comparison._cells import Cell
from braidlora.comparison._references import References
from braidlora.comparison._rows import Row
from braidlora.comparison.statistics import Floats, collapsed, intervals, summary
from braidlora.evaluation.balance import delta_m

# Sections that a row may change and keep the same references.
_SINGLE_KEEPS = ("adapter", "training", "mixing")


@dataclass(frozen=True)
class RowRuns:
    """The finished runs of one row of the table, by seed, and how its tuned values were chosen."""

    row: Row
    cells: dict[int, Cell]
    tuned: dict[str, Any]
    tuning: list[dict[str, Any]]


def keeps_references(row: Row) -> bool:
    """Whether the recipe's single-task LoRAs are the right references for this row."""
    return all(key.split(".")[0] in _SINGLE_KEEPS for key in row.overrides)


def row_entry(runs: RowRuns, references: References, directory: Path) -> dict[str, Any]:
    """One entry of `rows`, without its difference from the baseline."""
    row, cells = runs.row, runs.cells.values()
    metrics = [cell.metrics() for cell in cells]
    worst = summary([one["worst"] for one in metrics])
    return {
        "name": row.name,
        "label": row.label,
        "overrides": row.overrides,
        "tuned": runs.tuned or None,
        "tuning": runs.tuning,
        "trainable_parameters": metrics[0]["trainable_parameters"],
        "seconds": summary([one["seconds"] for one in metrics]),
        "peak_memory_mib": summary([cell.note()["peak_memory_mib"] for cell in cells]),
        "seeds": list(runs.cells),
        "validation_losses": [cell.note()["validation_loss"] for cell in cells],
        "tasks": {
            task: summary([one["tasks"][task]["score"] for one in metrics]) for task in metrics[0]["tasks"]
        },
        "mean": summary([one["mean"] for one in metrics]),
        "collapsed": collapsed_seeds(runs),
        "worst": {**worst, "tasks": [one["worst_task"] for one in metrics]},
        **_delta_m(row, dict(zip(runs.cells, metrics, strict=True)), references),
        "runs": [cell.run.path.relative_to(directory).as_posix() for cell in cells],
    }


def collapsed_seeds(runs: RowRuns) -> list[int]:
    """Seeds whose mean score fell far below that of the row's other seeds."""
    seeds = list(runs.cells)
    return [
        seeds[position] for position in collapsed([cell.metrics()["mean"] for cell in runs.cells.values()])
    ]


def _delta_m(row: Row, metrics: Mapping[int, dict[str, Any]], references: References) -> dict[str, Any]:
    """Δm% seed by seed: a seed's scores against the single-task LoRAs of the same seed."""
    if references.entry["reason"] is not None:
        return {"delta_m": None, "delta_m_reason": references.entry["reason"]}
    if not keeps_references(row):
        keys = ", ".join(row.overrides)
        return {"delta_m": None, "delta_m_reason": f"the single-task LoRAs were trained without its {keys}"}
    values = []
    for seed, one in metrics.items():
        scores = {task: entry["score"] for task, entry in one["tasks"].items()}
        change = delta_m(scores, references.scores[seed])
        if change.value is None:
            return {"delta_m": None, "delta_m_reason": f"seed {seed}: {change.reason}"}
        values.append(change.value)
    return {"delta_m": summary(values), "delta_m_reason": None}


def paired_differences(
    rows: Sequence[RowRuns], baseline: str, confidence: float
) -> dict[str, dict[str, Any]]:
    """`difference` and `difference_reason` of every row, by name: row minus baseline.

    The two runs of a seed are paired, test row by test row. A row with other seeds than the baseline, or tested on
    other rows, gets a reason instead.
    """
    found: dict[str, dict[str, Any]] = {}
    base = next((one for one in rows if one.row.name == baseline), None)
    if base is None:
        missing = f"the baseline {baseline} has no finished run"
        return {one.row.name: {"difference": None, "difference_reason": missing} for one in rows}
    reference = _Scores(base)
    by_name = {one.row.name: one for one in rows}
    paired: list[tuple[str, _Scores]] = []
    for one in rows:
        scores = _Scores(one)
        reason = None if one is base else _not_paired(scores, reference)
        found[one.row.name] = {"difference": None, "difference_reason": reason}
        if one is not base and reason is None:
            paired.append((one.row.name, scores))
    if not paired:
        return found
    tasks = list(reference.of)
    stacked = [np.stack([scores.of[task] - reference.of[task] for _, scores in paired]) for task in tasks]
    sure = intervals(stacked, same_rows=reference.same_rows(), confidence=confidence)
    for number, (overall, by_task) in enumerate(sure):
        per_seed = np.mean([scores[number].mean(axis=1) for scores in stacked], axis=0)
        found[paired[number][0]]["difference"] = {
            "baseline": baseline,
            **overall._asdict(),
            "judged": not (collapsed_seeds(base) or collapsed_seeds(by_name[paired[number][0]])),
            "values": per_seed.tolist(),
            "tasks": {task: one._asdict() for task, one in zip(tasks, by_task, strict=True)},
        }
    return found


class _Scores:
    """Scores of a row's runs: for each task an array (seeds, test rows), and fingerprints of the rows by seed."""

    def __init__(self, runs: RowRuns) -> None:
        self.name, self.seeds = runs.row.name, list(runs.cells)
        cells = list(runs.cells.values())
        data = [cell.note()["made_from"]["data"] for cell in cells]
        self.rows = {task: [one[task]["test"] for one in data] for task in cells[0].metrics()["tasks"]}
        self.of: dict[str, Floats] = {}
        for task in self.rows:
            scores = [cell.scores(task) for cell in cells]
            if len({len(run) for run in scores}) == 1:
                self.of[task] = np.array(scores)

    def same_rows(self) -> bool:
        """Whether all seeds were tested on the same rows."""
        return all(len(set(prints)) == 1 for prints in self.rows.values())


def _not_paired(scores: _Scores, reference: _Scores) -> str | None:
    if scores.seeds != reference.seeds:
        return (
            f"{scores.name} finished with the seeds {', '.join(map(str, scores.seeds))}, {reference.name} with "
            f"{', '.join(map(str, reference.seeds))}; differences are paired by seed"
        )
    if scores.rows != reference.rows:
        return f"{scores.name} and {reference.name} were tested on different rows"
    if len(scores.of) != len(scores.rows):
        return "the seeds have different numbers of test rows"
    return None
