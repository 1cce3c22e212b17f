"""F1 of labels: of one, or the mean over all of them; and what each row contributes to it.

F1 of a label is 2TP / (2TP + FP + FN). It is no mean over rows, but it is a smooth function of the rates t of true
positives and e of errors, F = 2t / (2t + e), so a row with indicators t_i and e_i contributes

    F + (2e t_i − 2t e_i) / (2t + e)²

to first order (the delta method). The mean of these values over the rows is F itself, so differences between two models
have row-by-row confidence intervals, as those of other metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braidlora.answers import plain_answer

Floats = NDArray[np.float64]
METRICS = ("macro_f1", "f1")
"""Metrics that are computed from all rows of a task together."""


def label_pairs(
    records: Sequence[Mapping[str, Any]], labels: Sequence[str] | None
) -> list[tuple[str, str | None]]:
    """The right label of every row and the predicted one.

    An answer that is no label of the task, free text of a language model, is None: it counts against its row's right
    label and for no other. Of several right answers the predicted one counts, otherwise the first.

    Args:
        records: lines of a prediction file.
        labels: of the task; None takes those of the references.
    """
    right = [[plain_answer(one) for one in _as_list(record["reference"])] for record in records]
    known = {plain_answer(label) for label in labels or ()} | {one for answers in right for one in answers}
    pairs = []
    for answers, record in zip(right, records, strict=True):
        given = None if record["extracted"] is None else plain_answer(record["extracted"])
        predicted = given if given in known else None
        pairs.append((predicted if predicted in answers and predicted is not None else answers[0], predicted))
    return pairs


def f1_rows(pairs: Sequence[tuple[str, str | None]], positive: str | None = None) -> Floats:
    """What every row contributes to F1, times 100; the mean is the score.

    Args:
        pairs: right and predicted label of every row.
        positive: the label; None for the mean over all labels that are right or predicted in some row, as
            scikit-learn's `average="macro"` takes it.

    Returns:
        (n,) float64, not bounded by 0 and 100.
    """
    if positive is None:
        chosen = list(dict.fromkeys(one for pair in pairs for one in pair if one is not None))
    else:
        chosen = [plain_answer(positive)]
    return np.mean([_of_label(label, pairs) for label in chosen], axis=0)


def f1_score(pairs: Sequence[tuple[str, str | None]], positive: str | None = None) -> float:
    """F1 times 100; arguments as `f1_rows`. A label that is neither right nor predicted anywhere has 0."""
    return float(f1_rows(pairs, positive).mean())


def _of_label(label: str, pairs: Sequence[tuple[str, str | None]]) -> Floats:
    right = np.array([one == label for one, _ in pairs])
    predicted = np.array([one == label for _, one in pairs])
    hits, errors = (right & predicted).astype(np.float64), (right ^ predicted).astype(np.float64)
    t, e = hits.mean(), errors.mean()
    if t == 0.0:
        return np.zeros(len(pairs))
    whole = 2.0 * t + e
    values: Floats = 100.0 * (2.0 * t / whole + (2.0 * e * hits - 2.0 * t * errors) / whole**2)
    return values


def _as_list(reference: str | list[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else reference
