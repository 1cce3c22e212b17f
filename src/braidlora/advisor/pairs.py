"""Which tasks pull against each other, and the probe's matrices as one number each. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Matrix = Sequence[Sequence[float | None]]
AGAINST, TOGETHER, NEITHER = "against", "together", "neither"
_ALL = 4  # pairs of halves of two tasks' rows
_LEAST = 0.1  # of a cosine: below it, a step for one task changes the other's loss by little

# What calibration looks at: name, and how tables call it.
MEASURES: dict[str, str] = {
    "gradients_A": "cosine of gradients on A",
    "gradients_B": "cosine of gradients on B",
    "relative_A": "the same, relative to within a task, A",
    "relative_B": "the same, relative to within a task, B",
    "against": "share of pairs that pull against each other",
    "updates": "cosine of ΔW",
    "columns": "similarity of B above chance",
    "inputs": "likeness of A x",
}


def judge(cosine: float | None, signs: int) -> str:
    """`against` or `together` if all four pairs of halves of the rows have that sign and |cosine| ≥ 0.1, or `neither`.

    Args:
        cosine: between the gradients of two tasks.
        signs: positive minus negative cosines among the four.
    """
    if cosine is None or abs(cosine) < _LEAST:
        return NEITHER
    return {-_ALL: AGAINST, _ALL: TOGETHER}.get(signs, NEITHER)


def pairs_of(
    tasks: Sequence[str], gradients: Mapping[str, Any], found: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """All pairs of tasks, those with the lowest cosine of gradients first.

    Args:
        tasks: names.
        gradients: the `factors` of `measure_gradients`.
        found: the matrices `updates`, `columns` (or None) and `inputs`.
    """
    pairs = []
    for t in range(len(tasks)):
        for u in range(t):
            pair: dict[str, Any] = {"tasks": [tasks[u], tasks[t]]}
            for factor in ("A", "B"):
                one = gradients[factor]
                cosine = one["cosine"][t][u]
                pair[factor] = {"cosine": cosine, "pull": judge(cosine, one["signs"][t][u])}
            for name in ("updates", "columns", "inputs"):
                pair[name] = None if found[name] is None else found[name][t][u]
            pairs.append(pair)
    return sorted(pairs, key=lambda pair: min(pair[f]["cosine"] or 0.0 for f in ("A", "B")))


def against(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The pairs that pull against each other on A or on B."""
    return [pair for pair in pairs if AGAINST in (pair["A"]["pull"], pair["B"]["pull"])]


def summarize(
    gradients: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], chance: float | None
) -> dict[str, Any]:
    """One number for each of `MEASURES`, None where it is not known.

    Args:
        gradients: the `factors` of `measure_gradients`.
        pairs: of `pairs_of`.
        chance: the chance level of `columns`.
    """
    measures: dict[str, float | None] = {}
    for factor in ("A", "B"):
        between, within = gradients[factor]["between"], gradients[factor]["within"]
        measures[f"gradients_{factor}"] = between
        known = between is not None and within is not None and within > 0.0
        measures[f"relative_{factor}"] = between / within if known else None
    measures["against"] = len(against(pairs)) / len(pairs)
    for name in ("updates", "columns", "inputs"):
        values = [pair[name] for pair in pairs if pair[name] is not None]
        measures[name] = statistics.fmean(values) if values else None
    columns = measures["columns"]
    if columns is not None and chance is not None:
        measures["columns"] = (columns - chance) / (1.0 - chance)
    return {name: measures[name] for name in MEASURES}
