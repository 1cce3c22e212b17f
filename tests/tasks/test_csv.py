"""CSV records with broken quotes: the inner lines of a cell are never rows, whatever they look like."""

from __future__ import annotations

import csv
import io
import random

import pytest
from task_helpers import config_of

from braidlora.errors import DataError
from braidlora.tasks import load_tasks
from braidlora.tasks._csv import records

HEAD = "instruction,output\n"
ROW = "good,row\n"


def read(text):
    return list(records(io.StringIO(text, newline="\n")))


def good(text):
    return [record.cells for record in read(text) if record.problem is None]


def regions(text):
    return [(record.first, record.last) for record in read(text) if record.problem is not None]


@pytest.mark.parametrize(
    ("broken", "last"),
    [
        ('"junk after"the quote,x\n', 1),
        ('"a "quoted" word",x\n', 1),
        ('"first\nsecond "quoted" line\nthird, line",x\n', 3),  # the third line has two cells
        ('"first\nsecond "quoted" line\nthird, line\nfourth, line",x\n', 4),
        ('x,"first\n"quoted" line\n\nthird, line"\n', 4),
        ('"he said "x", and\nmore, text\nto the, end",y\n', 3),
        ('"one\ntwo "x" three\nfour ""five"", six\nseven, eight",y\n', 4),
        ('"one\ntwo "x" three\nfour, "five"\nsix, "seven" eight\nnine, ten",y\n', 5),
        ('"one\ntwo "x"\nthree, four", "five\nsix, seven"\n', 4),
    ],
)
@pytest.mark.parametrize("after", ['"quoted, row",z\n', ROW + '"quoted, row",z\n', ROW + '"a\nb, c",z\n'])
def test_a_broken_cell_is_one_region_and_its_inner_lines_are_no_rows(broken, last, after):
    rows = good(HEAD + ROW + broken + after)
    assert rows == [["instruction", "output"], ["good", "row"], *good(HEAD + after)[1:]]
    assert regions(HEAD + ROW + broken + after) == [(3, last + 2)]


@pytest.mark.parametrize("broken", ['"junk after"the quote,x\n', '"a "quoted" word",x\n'])
def test_rows_without_quotes_after_a_cell_that_was_closed_are_kept(broken):
    assert good(HEAD + broken + ROW + ROW) == [["instruction", "output"], ["good", "row"], ["good", "row"]]


@pytest.mark.parametrize("text", ['"first\nsecond, line\n', 'a,"b\n', '"a "b" c\nd, e\n'])
def test_a_cell_that_is_never_closed_stops_even_when_bad_rows_are_skipped(tmp_path, text):
    [*_, last] = read(HEAD + text)
    assert last.never_closed
    path = tmp_path / "rows.csv"
    path.write_text(HEAD + ROW + text)
    with pytest.raises(DataError, match=r"rows\.csv:3: not valid CSV: .*Correct the quotes"):
        load_tasks(config_of(str(path), prompt={"bad_rows": "skip"}))


def test_the_skipped_region_is_counted_once_with_its_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(HEAD + ROW + '"first\nsecond "quoted" line\nthird, line",x\n"last",z\n')
    task = load_tasks(config_of(str(path), prompt={"bad_rows": "skip"}))[0]
    assert [row["output"] for row in task.train] == ["row", "z"]
    assert (task.counts["train"].read, task.counts["train"].skipped) == (3, 1)
    assert (
        task.counts["train"].problems[0].startswith(f"{path}:3: not valid CSV: a quote inside a quoted cell")
    )
    assert "(lines 3 to 5)" in task.counts["train"].problems[0]


def test_well_formed_files_read_as_the_csv_module_reads_them():
    draw = random.Random(0)
    pieces = ["a", "é", ",", '"', "\n", "\r\n", "\u2028", "\x85", " ", "", "\x0b", "b c"]
    for _ in range(300):
        rows = [
            ["".join(draw.choices(pieces, k=draw.randrange(6))) for _ in range(3)]
            for _ in range(draw.randrange(1, 8))
        ]
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator=draw.choice(["\n", "\r\n"])).writerows(rows)
        lines = text.getvalue().encode().split(b"\n")
        given = [line.decode() + "\n" for line in lines[:-1]] + [lines[-1].decode()]
        assert [record.cells for record in records(filter(None, given))] == rows


def test_a_cell_longer_than_the_csv_module_allows_by_default():
    cell = "word, " * 50_000
    assert good(f'"{cell}",x\n') == [[cell, "x"]]


def test_carriage_returns(tmp_path):
    assert good("a,b\r\nc,d\r\n") == [["a", "b"], ["c", "d"]]
    [record] = read("a\rb,c\n")
    assert "carriage return" in record.problem
    old = tmp_path / "old.csv"
    old.write_bytes(b"instruction,output\ra,b\rc,d\r")
    assert [row["output"] for row in load_tasks(config_of(str(old)))[0].train] == ["b", "d"]
