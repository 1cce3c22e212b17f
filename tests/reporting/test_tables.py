"""How numbers are written, and which value may be called best."""

import pytest

from braidlora.reporting.tables import best, interval, listed, mark, number, plural, spread


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (12345.678, 1, False, "12,345.7"),
        (-0.04, 1, False, "0.0"),
        (-0.04, 1, True, "+0.0"),
        (-2.0, 1, True, "−2.0"),
        (1e6, 0, False, "1,000,000"),
        (None, 1, False, "–"),
    ],
)
def test_numbers_are_written_for_readers(value, digits, sign, text):
    assert number(value, digits, sign=sign) == text


def test_spread_shows_the_deviation_over_seeds_where_there_is_one():
    assert spread({"mean": 50.0, "std_seeds": 1.25, "values": [49, 51]}) == "50.0 ± 1.2"
    assert spread({"mean": 50.0, "std_seeds": None, "values": [50]}) == "50.0"
    assert spread({"mean": None, "std_seeds": None, "values": [None]}) == "–"
    assert spread(None) == "–"


def test_an_interval_is_signed():
    assert interval({"mean": 1.0, "low": -0.5, "high": 2.5}) == "+1.0 [−0.5, +2.5]"
    assert interval({"mean": 1.0, "low": None, "high": None}) == "+1.0"
    assert interval(None) == "–"


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


def test_words():
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert [plural(1, "run"), plural(1200, "run")] == ["1 run", "1,200 runs"]
