"""Scores of one prediction against its reference, each from 0 to 100; a task's score is the mean over its rows."""

from __future__ import annotations

import functools
from typing import Any

from braidlora.answers import plain_answer
from braidlora.evaluation._tokens import tokens
from braidlora.evaluation.extraction import answers_match

_ASCII = "_ascii"
ROUGE = ("rouge1", "rouge2", "rougeL", "rouge1_ascii", "rouge2_ascii", "rougeL_ascii")

Reference = str | list[str]
"""What a prediction is compared with: one right answer, or several."""


def as_list(reference: Reference) -> list[str]:
    return [reference] if isinstance(reference, str) else reference


def score_row(metric: str, rule: str, prediction: str, extracted: str | None, reference: Reference) -> float:
    """The score of one row, 0 to 100; of several right answers, the best score.

    Args:
        metric: one of `ROUGE`, `exact_match`, `accuracy`, or one of `f1.METRICS`, for which a row is right or wrong.
        rule: the task's extraction rule; `none` scores the prediction itself.
        prediction: the model's text.
        extracted: the answer that `extraction.extract` found in it; None scores 0 under every metric.
        reference: with a rule the answer of `extraction.reference_answer`, otherwise the reference text;
            or a list of right answers.

    Raises:
        ValueError: `metric` is not one of these.
    """
    if extracted is None:
        return 0.0
    answer, right = prediction if rule == "none" else extracted, as_list(reference)
    if metric in ROUGE:
        return max(rouge(metric, answer, one) for one in right)
    if metric in ("accuracy", "macro_f1", "f1") and rule != "none":
        return 100.0 * any(answers_match(rule, extracted, one) for one in right)
    if metric in ("exact_match", "accuracy", "macro_f1", "f1"):
        return 100.0 * any(exact_match(answer, one) for one in right)
    raise ValueError(
        f"metric: got {metric!r}; expected one of {', '.join(ROUGE)}, exact_match, accuracy, macro_f1, f1"
    )


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two texts are equal up to whitespace: ends are stripped and every run of it counts as one space.

    Case and punctuation count, because they are all there is to tasks such as "add the punctuation". An accent may be
    composed or decomposed (Unicode's NFC).
    """
    return plain_answer(prediction) == plain_answer(reference)


def rouge(metric: str, prediction: str, reference: str) -> float:
    """ROUGE-1, ROUGE-2 or ROUGE-L (longest common subsequence) F-measure × 100, by the rouge-score package.

    Without the Porter stemmer, as the package does by default. Words may be in any script; Chinese, Japanese, Thai and
    other scripts without spaces are compared character by character. On ASCII text tokens are those of the package's
    own tokenizer. `rouge1_ascii`, `rouge2_ascii` and `rougeL_ascii` use that tokenizer for all text, as published
    results do: it keeps `[a-z0-9]` only, so text in another script scores 0.
    """
    name = metric.removesuffix(_ASCII)
    return 100.0 * _scorer(metric).score(reference, prediction)[name].fmeasure


def is_seen(metric: str, text: str) -> bool:
    """Whether a metric of `ROUGE` finds any token in `text`."""
    return bool(_tokenizer(metric).tokenize(text))


@functools.cache
def _scorer(metric: str) -> Any:
    # Imported late: rouge-score pulls in nltk, which no other metric needs.
    from rouge_score.rouge_scorer import RougeScorer

    name = metric.removesuffix(_ASCII)
    return RougeScorer([name], tokenizer=_tokenizer(metric))


@functools.cache
def _tokenizer(metric: str) -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=False) if metric.endswith(_ASCII) else _Tokenizer()


class _Tokenizer:
    """The interface of rouge-score's tokenizers."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)
