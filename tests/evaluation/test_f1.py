"""F1 against its definition by counting, and its row values against a jackknife."""

import random

import numpy as np
import pytest

from braidlora.evaluation.f1 import f1_rows, f1_score, label_pairs
from braidlora.evaluation.scoring import row_values


def by_counting(pairs, label):
    tp = sum(right == given == label for right, given in pairs)
    fp = sum(given == label != right for right, given in pairs)
    fn = sum(right == label != given for right, given in pairs)
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return 100 * 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def drawn(seed, rows=200, labels="abcd"):
    draw = random.Random(seed)
    return [(draw.choice(labels), draw.choice([*labels[1:], None])) for _ in range(rows)]


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_that_of_precision_and_recall_and_macro_is_the_mean_over_labels(seed):
    pairs = drawn(seed)
    for label in "abcd":
        assert f1_score(pairs, label) == pytest.approx(by_counting(pairs, label), abs=1e-10)
    expected = np.mean([by_counting(pairs, label) for label in "abcd"])
    assert f1_score(pairs) == pytest.approx(expected, abs=1e-10)


def test_only_labels_that_occur_count_and_free_text_is_no_label():
    pairs = [("a", "a"), ("b", None), ("a", "a")]
    assert f1_score(pairs) == pytest.approx((100 + 0) / 2)
    assert f1_score([("a", None)]) == 0.0
    assert f1_score(pairs, "c") == 0.0


@pytest.mark.parametrize("positive", [None, "b"])
def test_row_values_have_the_score_as_mean_and_the_spread_of_the_jackknife(positive):
    pairs = drawn(9, rows=400)
    values, score = f1_rows(pairs, positive), f1_score(pairs, positive)
    assert values.mean() == pytest.approx(score, abs=1e-9)
    n = len(pairs)
    without = np.array([f1_score(pairs[:row] + pairs[row + 1 :], positive) for row in range(n)])
    jackknife = (n - 1) / n * ((without - without.mean()) ** 2).sum()
    assert values.var(ddof=1) / n == pytest.approx(jackknife, rel=0.03)


def line(reference, prediction):
    return {"reference": reference, "prediction": prediction, "extracted": prediction, "score": 0.0}


def test_pairs_compare_texts_as_exact_match_does_and_take_the_right_one_of_several():
    records = [
        line("very  good", " very good"), line(["yes", "true"], "true"), line(["yes", "true"], "maybe"),
        line("no", "something else"), line("no", None), line("yes", "caf\u00e9"),
    ]  # fmt: skip
    assert label_pairs(records, ["very good", "cafe\u0301"]) == [
        ("very good", "very good"), ("true", "true"), ("yes", None), ("no", None), ("no", None), ("yes", "caf\u00e9"),
    ]  # fmt: skip


def test_other_metrics_keep_the_score_of_each_row():
    records = [line("a", "a") | {"score": 100.0}, line("a", "b") | {"score": 12.5}]
    assert row_values("rouge1", records) == [100.0, 12.5]
    assert sum(row_values("macro_f1", records, ["a", "b"])) / 2 == pytest.approx(100 * (2 / 3 + 0) / 2)
