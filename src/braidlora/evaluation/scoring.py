"""From predictions to a task's score, and the summary over tasks that `metrics.json` holds. No torch here."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from braidlora.errors import DataError
from braidlora.evaluation import f1
from braidlora.evaluation.balance import balance, delta_m
from braidlora.evaluation.extraction import extract, find_reference, reference_answer
from braidlora.evaluation.metrics import ROUGE, Reference, as_list, is_seen, score_row
from braidlora.tasks.options import answers_of

if TYPE_CHECKING:
    from braidlora.tasks import Row, Task


def references(task: Task) -> list[Reference]:
    """The reference of each test row: the label, or the answer under the task's extraction rule.

    A row with several right answers has a list of them.

    Raises:
        DataError: a row's reference contains no answer under that rule.
    """
    if task.kind == "classify":
        return [row["label"] for row in task.test]
    found: list[Reference] = []
    for index, row in enumerate(task.test):
        place = f"task {task.name}, test row {index}"
        answers = [
            reference_answer(task.extract, task.template.answer(answer), place) for answer in answers_of(row)
        ]
        found.append(answers if len(answers) > 1 else answers[0])
    if task.metric in ROUGE:
        unseen = [
            answer for answers in found for answer in as_list(answers) if not is_seen(task.metric, answer)
        ]
        if unseen:
            other = task.metric.removesuffix("_ascii")
            instead = f"{other}, which reads other scripts" if other != task.metric else "exact_match"
            warnings.warn(
                f"task {task.name}: {task.metric} finds no token in {len(unseen)} of {len(found)} "
                f"references, the first {unseen[0][:60]!r}; they score 0 whatever is predicted. Use {instead}.",
                stacklevel=2,
            )
    return found


def answer_of(row: Row) -> str:
    """The one answer that stands for a `generate` row: of several right ones, the one it trains on."""
    answers = answers_of(row)
    return answers[0] if len(answers) == 1 else str(row["output"])


def record(task: Task, index: int, prompt: str, reference: Reference, prediction: str) -> dict[str, Any]:
    """One line of a prediction file: index, prompt, reference, prediction, extracted (or null) and score, 0 to 100."""
    rule = "none" if task.kind == "classify" else task.extract
    extracted = extract(rule, prediction)
    return {
        "index": index,
        "prompt": prompt,
        "reference": reference,
        "prediction": prediction,
        "extracted": extracted,
        "score": score_row(task.metric, rule, prediction, extracted, reference),
    }


def task_metrics(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"metric", "score", "n"}` of one task.

    A task with labels also has `accuracy` and `macro_f1`, whatever its metric, and with `metric: f1` its `positive`
    label; one with an extraction rule has `unparsed`, the number of rows without an extractable answer.
    """
    labels = task.labels if task.kind == "classify" else task.options
    metrics = {
        "metric": task.metric,
        "score": math.fsum(row_values(task.metric, records, labels, task.positive)) / len(records),
        "n": len(records),
    }
    if labels is not None or task.metric in f1.METRICS:
        pairs = f1.label_pairs(records, labels)
        metrics["accuracy"] = 100.0 * sum(right == given for right, given in pairs) / len(pairs)
        metrics["macro_f1"] = f1.f1_score(pairs)
    if task.metric in f1.METRICS:
        metrics["labels"] = labels
    if task.positive is not None:
        metrics["positive"] = task.positive
    if task.kind == "generate" and task.extract != "none":
        metrics["unparsed"] = sum(record["extracted"] is None for record in records)
    return metrics


def row_values(
    metric: str,
    records: Sequence[Mapping[str, Any]],
    labels: Sequence[str] | None = None,
    positive: str | None = None,
) -> list[float]:
    """What every row contributes to a task's score, which is their mean.

    For most metrics this is the row's own score. F1 is computed from all rows together; see `f1.f1_rows`.

    Args:
        metric: of the task.
        records: lines of its prediction file, in order.
        labels, positive: of the task, as its entry in `metrics.json` has them.
    """
    if metric not in f1.METRICS:
        return [float(record["score"]) for record in records]
    return list(map(float, f1.f1_rows(f1.label_pairs(records, labels), positive)))


def summarize(
    tasks: Mapping[str, Mapping[str, Any]],
    single_task_scores: Mapping[str, float],
    without_test_rows: Iterable[str] = (),
) -> dict[str, Any]:
    """The metrics of a run: per task, and over tasks.

    Args:
        tasks: `task_metrics` by name.
        single_task_scores: scores of single-task LoRAs, which Δm% compares with.
        without_test_rows: names of tasks that could not be scored.

    Returns:
        `{"tasks", "mean", "worst", "worst_task", "std", "delta_m"}`, `delta_m_reason` if `delta_m` is null, and
        `without_test_rows` if there are such tasks. `worst` is the lowest score, `std` the population standard
        deviation over the tasks.
    """
    scores = {name: task["score"] for name, task in tasks.items()}
    spread = balance(scores)
    change = delta_m(scores, single_task_scores)
    metrics: dict[str, Any] = {
        "tasks": dict(tasks),
        "mean": spread.mean,
        "worst": spread.worst,
        "worst_task": spread.worst_task,
        "std": spread.std,
        "delta_m": change.value,
    }
    if change.value is None:
        metrics["delta_m_reason"] = change.reason
    if left_out := list(without_test_rows):
        metrics["without_test_rows"] = left_out
    return metrics


def majority_scores(tasks: Sequence[Task]) -> dict[str, float]:
    """`majority_score` of every task that has one, by name."""
    scores = {task.name: majority_score(task) for task in tasks if task.train and task.test}
    return {name: score for name, score in scores.items() if score is not None}


def majority_score(task: Task) -> float | None:
    """The test score of always giving the most frequent training answer (ties: the first one seen).

    Training rows without an answer under the task's `extract` (a rationale alone, say) do not count.

    Returns:
        0 to 100; None if no training row has an answer.

    Raises:
        DataError: the task has no training or no test rows.
    """
    if not task.train or not task.test:
        part = "test" if task.train else "training"
        raise DataError(f"task {task.name}: no {part} rows, so there is no majority answer to score.")
    if task.kind == "classify":
        answers = [row["label"] for row in task.train]
    else:
        found = (find_reference(task.extract, answer_of(row)) for row in task.train)
        answers = [answer for answer in found if answer is not None]
    if not answers:
        return None
    [(answer, _)] = Counter(answers).most_common(1)
    records = [record(task, index, "", reference, answer) for index, reference in enumerate(references(task))]
    return float(task_metrics(task, records)["score"])
