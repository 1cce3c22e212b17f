"""Scores of one prediction against its reference, each from 0 to 100; a task's score is the mean over its rows."""

from __future__ import annotations

import functools
from typing import Any

from braidlora.evaluation.extraction import answers_match

ROUGE = ("rouge1", "rouge2", "rougeL")


def score_row(metric: str, rule: str, prediction: str, extracted: str | None, reference: str) -> float:
    """The score of one row, 0 to 100.

    Args:
        metric: `rouge1`, `rouge2`, `rougeL`, `exact_match` or `accuracy`.
        rule: the task's extraction rule; `none` scores the prediction as it stands.
        prediction: the model's text.
        extracted: what `extraction.extract` found in it; None scores 0 under every metric.
        reference: under a rule the answer of `extraction.reference_answer`, otherwise the reference text.

    Raises:
        ValueError: `metric` is not one of these.
    """
    if extracted is None:
        return 0.0
    answer = prediction if rule == "none" else extracted
    if metric in ROUGE:
        return rouge(metric, answer, reference)
    if metric == "accuracy" and rule != "none":
        return 100.0 * answers_match(rule, extracted, reference)
    if metric in ("exact_match", "accuracy"):
        return 100.0 * exact_match(answer, reference)
    raise ValueError(f"metric: got {metric!r}; expected one of {', '.join(ROUGE)}, exact_match, accuracy")


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two texts are equal but for white space: ends are stripped and every run of it counts as one space.

    Case and punctuation count, for they are the whole answer of tasks such as "add the punctuation".
    """
    return prediction.split() == reference.split()


def rouge(metric: str, prediction: str, reference: str) -> float:
    """ROUGE-1, ROUGE-2 or ROUGE-L (longest common subsequence) F-measure × 100, by the rouge-score package.

    Without the Porter stemmer, the package's own default. Its tokenizer lower-cases and keeps `[a-z0-9]` only, so a
    text in another script scores 0.
    """
    return 100.0 * _scorer(metric).score(reference, prediction)[metric].fmeasure


@functools.cache
def _scorer(metric: str) -> Any:
    # Imported late: rouge-score pulls in nltk, which no other metric needs.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([metric], use_stemmer=False)
