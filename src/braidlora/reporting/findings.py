"""Warnings that come before any score: tasks that were not learned, truncated rows, labels never seen.

From the numbers of metrics and data files alone; each finding is one line that ends with what to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from braidlora.tables import listed, plural

_MANY = 0.10  # share of rows that are cut off
_SAME = 0.05  # share of test rows that are also training rows
_Z = 1.96
_SHOWN = 4


def data_findings(data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Findings about the rows.

    Args:
        data: the `tasks` of a run's data.json: per task and part its counts; `encoded` has those of the tokens,
            `unseen_labels` of the test rows the answers that no training row has.
    """
    found = []
    for task, parts in data.items():
        test = parts.get("test", {})
        unseen = test.get("unseen_labels") or {}
        if unseen:
            names = ", ".join(map(repr, list(unseen)[:_SHOWN])) + (", …" if len(unseen) > _SHOWN else "")
            found.append(
                f"{task}: {plural(sum(unseen.values()), 'test row')} of {test['rows']:,} have a label that no training "
                f"row has ({names}), so they cannot be answered. Add such rows to the training data, or remove them "
                "from the test rows."
            )
        repeated = test.get("in_train", 0)
        if repeated and repeated >= _SAME * test["rows"]:
            found.append(
                f"{task}: {repeated:,} of {test['rows']:,} test rows are also training rows, so its score is too high. "
                "Remove them from the training rows or from the test rows."
            )
    return found + _cut(data)


def _cut(data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tasks of which many training rows lost tokens, or were dropped, to `prompt.cutoff`."""
    found = []
    for word, key in (("truncated", "truncated"), ("dropped", "dropped")):
        tasks = {}
        for task, parts in data.items():
            encoded = parts.get("train", {}).get("encoded") or {}
            rows = encoded.get("rows", 0) + encoded.get("dropped", 0)
            if rows and encoded.get(key, 0) >= _MANY * rows:
                tasks[task] = encoded[key] / rows
        if tasks:
            shares = listed([f"{share:.0%} of {task}" for task, share in tasks.items()])
            found.append(
                f"prompt.cutoff: {shares} {word} because the rows are too long. Raise it (`braidlora preview RECIPE` "
                "shows the lengths)."
            )
    return found


Learned = Literal["yes", "no", "undecided"]


def learned(
    scores: Mapping[str, float], majority: Mapping[str, float], rows: Mapping[str, int]
) -> Learned | None:
    """Whether the mean over tasks is above that of always giving the most frequent answer.

    Two standard errors of a share, the larger of both, are attributed to chance: a lead within them is `undecided`.

    Args:
        scores, majority: by task, 0 to 100.
        rows: test rows by task.

    Returns:
        None if a task has no majority score.
    """
    if not scores or any(task not in majority for task in scores):
        return None
    lead = math.fsum(scores[task] - majority[task] for task in scores) / len(scores)
    if lead <= 0.0:
        return "no"
    return "yes" if lead > _chance(scores, majority, rows) else "undecided"


def tasks_by_learned(
    best: Mapping[str, float], majority: Mapping[str, float], rows: Mapping[str, int], answer: Learned
) -> list[str]:
    """Tasks of which `learned` of the best score alone is `answer`.

    Args:
        best: the highest score of any method, by task.
        majority, rows: as of `learned`.
    """
    return [task for task, score in best.items() if learned({task: score}, majority, rows) == answer]


def too_few_rows(tasks: Sequence[str]) -> str:
    """The finding about tasks that are `undecided`."""
    it, score = ("it was", "its score is") if len(tasks) == 1 else ("they were", "their scores are")
    return (
        f"Too few test rows to say whether {it} learned: {task_list(tasks)}; {score} above that of always giving the "
        "most frequent answer, but within the range of chance. Add test rows."
    )


def undecided(rows: int, score: str, majority: str) -> str:
    """The verdict where the highest score is above the most frequent answer's, but within the error.

    Args:
        rows: test rows of all tasks.
        score: in words, the highest score.
        majority: that of the most frequent answer.
    """
    return (
        f"Too few test rows ({rows:,}) to say whether anything was learned: the mean score is {score}, and always "
        f"giving the most frequent answer scores {majority}."
    )


def learn_more(settings: Mapping[str, Any]) -> str:
    """What to change when nothing was learned, with the present values.

    Args:
        settings: `learning_rate`, `epochs` and `max_steps` of the recipe; may be empty.
    """
    rate, epochs, steps = (settings.get(key) for key in ("learning_rate", "epochs", "max_steps"))
    if rate is None or epochs is None:
        return "Train longer or raise the learning rate."
    longer = f"--training.epochs={2 * epochs:g}, now {epochs:g}"
    if steps:
        longer = f"--training.max_steps={2 * steps}, now {steps}"
    return f"Train longer ({longer}) or raise the learning rate (--training.learning_rate={3 * rate:g}, now {rate:g})."


def _chance(scores: Mapping[str, float], majority: Mapping[str, float], rows: Mapping[str, int]) -> float:
    variances = [
        max(share * (1.0 - share) for share in (score / 100.0, majority[task] / 100.0)) / max(1, rows[task])
        for task, score in scores.items()
    ]
    return 100.0 * _Z * math.sqrt(math.fsum(variances)) / len(variances)


def task_list(tasks: Sequence[str]) -> str:
    """Up to four names, and how many more."""
    if len(tasks) <= _SHOWN + 1:
        return listed(list(tasks))
    return f"{', '.join(tasks[:_SHOWN])} and {len(tasks) - _SHOWN} more"
