"""How numbers and tables are written."""

import pytest

from braidlora.tables import (
    format_bytes,
    interval,
    listed,
    markdown_table,
    number,
    plural,
    spread,
    text_table,
)


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (12345.678, 1, False, "12,345.7"),
        (-0.04, 1, False, "0.0"),
        (-0.04, 1, True, "+0.0"),
        (-2.0, 1, True, "-2.0"),
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
    assert interval({"mean": 1.0, "low": -0.5, "high": 2.5}) == "+1.0 [-0.5, +2.5]"
    assert interval({"mean": 1.0, "low": None, "high": None}) == "+1.0"
    assert interval(None) == "–"


def test_words():
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert [plural(1, "run"), plural(1200, "run")] == ["1 run", "1,200 runs"]
    assert [format_bytes(999), format_bytes(1500), format_bytes(2.5e15)] == ["999 B", "1.5 kB", "2500.0 TB"]


def test_columns_are_aligned_numbers_to_the_right():
    lines = text_table(["task", "score"], [["a", 5.0], ["longer", 100.0], ["none", None]]).split("\n")
    assert lines == ["task    score", "-------------", "a         5.0", "longer  100.0", "none        –"]


def test_a_table_of_nothing_is_its_header():
    assert text_table(["task", "n"], []).split("\n")[0] == "task  n"


def test_a_row_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match="2 cells, the header 1"):
        text_table(["a"], [["x", "y"]])


def test_rules_and_columns_of_words():
    lines = text_table(["a", "b", "n"], [["x", "word", 1], ["mean", "", 10]], left=(0, 1), rules=[1]).split(
        "\n"
    )
    assert lines == ["a     b      n", "--------------", "x     word   1", "--------------", "mean        10"]


def test_markdown_escapes_its_own_bars():
    assert markdown_table(["", "n"], [["a|b", 1.25]]).split("\n") == [
        "|  | n |",
        "|---|---:|",
        "| a\\|b | 1.2 |",
    ]
