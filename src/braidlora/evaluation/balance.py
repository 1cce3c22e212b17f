"""How evenly a shared model serves its tasks: mean, worst task, spread, and Δm% over single-task models."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple


class DeltaM(NamedTuple):
    """Δm% in percent, or None with the reason why it is not defined."""

    value: float | None
    reason: str | None


class Balance(NamedTuple):
    """Summary of the scores of a run's tasks; every field is None without tasks."""

    mean: float | None
    worst: float | None
    """Score of the worst task: the lowest, because higher is better under every metric here."""
    worst_task: str | None
    std: float | None
    """Population standard deviation over the tasks (divided by T, not T − 1): the tasks are all there are."""


def delta_m(
    scores: Mapping[str, float],
    references: Mapping[str, float],
    lower_is_better: Collection[str] = (),
) -> DeltaM:
    """Δm% = (100 / T) Σ_t ±(S_t − M_t) / S_t (arXiv 2509.25414, the metric of its multi-task tables).

    M_t is the model's score on task t and S_t that of a single-task LoRA trained on t alone. The sign is + where higher
    is better and − where lower is better. A lower Δm% is better; a negative one means that the shared model beats the
    specialists.

    Args:
        scores: M_t by task.
        references: S_t by task; tasks without a score are ignored.
        lower_is_better: names of the tasks whose metric is better when lower.

    Returns:
        The value, or None and the reason: a reference is missing, zero, negative or not finite (the ratio would be
        undefined, or flip its sign), a score is not finite, or there are no tasks.

    Raises:
        ValueError: `lower_is_better` names a task that has no score.
    """
    unknown = sorted(set(lower_is_better) - set(scores))
    if unknown:
        raise ValueError(f"lower_is_better: no score for {', '.join(unknown)}; tasks are {', '.join(scores)}")
    if not scores:
        return DeltaM(None, "no task was scored")
    missing = [task for task in scores if task not in references]
    if len(missing) == len(scores):
        return DeltaM(None, "no single-task references were given")
    if missing:
        return DeltaM(None, f"no single-task reference for {', '.join(missing)}")
    terms = []
    for task, score in scores.items():
        reference = references[task]
        if not math.isfinite(reference) or reference <= 0:
            return DeltaM(None, f"the single-task reference of {task} is {reference:g}; it must be above 0")
        if not math.isfinite(score):
            return DeltaM(None, f"the score of {task} is {score}")
        term = (reference - score) / reference
        terms.append(-term if task in lower_is_better else term)
    return DeltaM(100.0 * math.fsum(terms) / len(terms), None)


def balance(scores: Mapping[str, float]) -> Balance:
    """Mean, worst task and spread of higher-is-better scores. Ties for the worst go to the first task."""
    if not scores:
        return Balance(None, None, None, None)
    values = list(scores.values())
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    worst_task = min(scores, key=scores.__getitem__)
    return Balance(mean, scores[worst_task], worst_task, math.sqrt(variance))
