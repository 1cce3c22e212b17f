"""Which differences are significant, and which method may be called the best."""

import pytest

from braidlora.reporting.significance import best, mark


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 2, "above"), (-2, -0.1, "below"), (-1, 1, ""), (0, 1, ""), (-1, 0, ""), (None, None, "")],
)
def test_a_mark_needs_an_interval_without_zero(low, high, expected):
    assert mark({"mean": 0.0, "low": low, "high": high}) == expected


@pytest.mark.parametrize(
    ("means", "marks", "baseline", "expected"),
    [
        ([50, 52, 51], ["", "above", ""], 0, 1),
        ([50, 52, 51], ["", "", ""], 0, None),  # highest, but not seen to be
        ([50, 52, 51], ["", "", "above"], 0, None),
        ([53, 52, 51], ["", "below", "below"], 0, 0),
        ([53, 52, 51], ["", "below", ""], 0, None),
        ([50, 52, 52], ["", "above", "above"], 0, None),  # a tie
        ([50, None, 52], ["", "", "above"], 0, 2),
        ([50, None, None], ["", "", ""], 0, None),  # nothing to be better than
        ([50, 52], ["", "above"], None, 1),
    ],
)
def test_best_is_said_only_of_what_is_seen_to_be(means, marks, baseline, expected):
    assert best(means, marks, baseline) == expected
