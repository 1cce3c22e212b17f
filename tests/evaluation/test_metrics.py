"""Row scores against counts made by hand."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braidlora.evaluation.metrics import exact_match, rouge, score_row


def overlap_f_measure(prediction: list[str], reference: list[str], n: int) -> float:
    """ROUGE-n as in Lin (2004), from word lists."""

    def grams(words: list[str]) -> Counter:
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    p, r = grams(prediction), grams(reference)
    common = sum((p & r).values())
    if not common:
        return 0.0
    precision, recall = common / sum(p.values()), common / sum(r.values())
    return 100 * 2 * precision * recall / (precision + recall)


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common_subsequence(a[:-1], b[:-1])
    return max(longest_common_subsequence(a[:-1], b), longest_common_subsequence(a, b[:-1]))


words = st.lists(st.sampled_from(["the", "cat", "cats", "sat", "on"]), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_rouge_equals_an_independent_count(prediction, reference):
    p, r = " ".join(prediction), " ".join(reference)
    assert rouge("rouge1", p, r) == pytest.approx(overlap_f_measure(prediction, reference, 1))
    assert rouge("rouge2", p, r) == pytest.approx(overlap_f_measure(prediction, reference, 2))
    lcs = longest_common_subsequence(prediction, reference)
    # precision = lcs / |p| and recall = lcs / |r|, so F = 2 lcs / (|p| + |r|)
    assert rouge("rougeL", p, r) == pytest.approx(100 * 2 * lcs / (len(prediction) + len(reference)))


def test_rouge_by_hand():
    # 3 common words of 4 and of 5: precision 3/4, recall 3/5, F = 2/3
    assert rouge("rouge1", "a big dog ran", "the big dog ran home") == pytest.approx(200 / 3)
    # "big dog", "dog ran" of 3 and of 4: F = 2 · 2 / (3 + 4)
    assert rouge("rouge2", "a big dog ran", "the big dog ran home") == pytest.approx(400 / 7)
    assert rouge("rouge1", "cats", "cat") == 0.0, "no stemmer"
    assert rouge("rouge1", "", "cat") == rouge("rouge1", "cat", "") == rouge("rouge2", "cat", "cat") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        ("yes", " yes\n", True),
        ("a  b\tc", "a b c", True),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ("ab", "a b", False),
        ("", "", True),
    ],
)
def test_exact_match_ignores_white_space_only(prediction, reference, equal):
    assert exact_match(prediction, reference) is equal


@pytest.mark.parametrize(
    ("metric", "rule", "prediction", "extracted", "reference", "score"),
    [
        ("accuracy", "boolq", "it is true", "true", "true", 100.0),
        ("accuracy", "boolq", "it is true", "true", "false", 0.0),
        ("accuracy", "boolq", "no idea", None, "false", 0.0),
        ("accuracy", "number", "1.0004", "1.0004", "1", 100.0),
        ("exact_match", "number", "1.0", "1.0", "1", 0.0),
        ("accuracy", "none", "same  text", "same  text", "same text", 100.0),
        ("exact_match", "none", "same", "same", "other", 0.0),
        ("rouge1", "none", "big dog", "big dog", "big cat", 50.0),
        ("rouge1", "boolq", "x", None, "x", 0.0),
        ("exact_match", "none", "no", "no", ["not the same", "no"], 100.0),
        ("exact_match", "none", "yes", "yes", ["not the same", "no"], 0.0),
        ("accuracy", "number", "7", "7", ["3", "7.0"], 100.0),
        ("rouge1", "none", "big dog", "big dog", ["cat", "big cat", "dogs"], 50.0),
    ],
)
def test_score_of_a_row(metric, rule, prediction, extracted, reference, score):
    assert score_row(metric, rule, prediction, extracted, reference) == pytest.approx(score)


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"got 'bleu'.*rouge1.*exact_match, accuracy"):
        score_row("bleu", "none", "a", "a", "a")
