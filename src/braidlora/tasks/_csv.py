"""CSV records as RFC 4180 defines them, one at a time; a stray quote makes one bad record.

Python's csv module reports a record with a stray quote at the line where it gives up and continues at the next line,
which may still be inside the cell: lines of text would become rows. Here the entire broken region is one bad record.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LONGEST_CELL = 2**27  # characters; the csv module's own limit of 131,072 rejects long documents
_QUOTES = re.compile('"+')


@dataclass(frozen=True)
class Record:
    """The cells of one record, or what is wrong with it; `first` and `last` are its line numbers, from 1."""

    first: int
    last: int
    cells: list[str]
    problem: str | None = None
    never_closed: bool = False


def records(lines: Iterable[str], delimiter: str = ",") -> Iterator[Record]:
    """The records of a CSV file, without blank lines.

    A quote inside a quoted cell that is neither doubled nor followed by the delimiter or the end of the line makes a
    bad record. The record extends to the first line that is certainly outside the cell: a quote opens at the start of a
    cell and closes at its end, so the next quotes in the file show which one it is. If no quote follows, the number of
    quotes so far decides. A cell that is still open at the end of the file is the last record (`never_closed`).

    Args:
        lines: the lines of the file, split at line feeds and including them.
        delimiter: the character between two cells.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    source = _Lines(lines)
    for line in source:
        first, part, inside = source.number, [line], False
        inside, broken = _scan(line, inside, delimiter)
        while inside and not broken:
            following = next(source, None)
            if following is None:
                break
            part.append(following)
            inside, broken = _scan(following, inside, delimiter)
        if broken:
            closed = _skip_region(source, sum(text.count('"') for text in part) % 2 == 1, delimiter)
            problem = "a quote inside a quoted cell; write it twice"
            yield Record(first, source.number, [], problem, never_closed=not closed)
        elif inside:
            yield Record(first, source.number, [], "a quoted cell is never closed", never_closed=True)
        elif part[0].strip("\r\n"):
            yield _parsed(first, source.number, part, delimiter)


class _Lines(Iterator[str]):
    """An iterator over lines that counts them and can take lines back."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines, self._back = iter(lines), deque[str]()
        self.number = 0

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._lines)
        self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)


def _parsed(first: int, last: int, part: list[str], delimiter: str) -> Record:
    if len(part) == 1 and '"' not in part[0] and "\r" not in part[0][:-2]:
        return Record(first, last, part[0].rstrip("\r\n").split(delimiter))
    try:
        [cells] = csv.reader(part, delimiter=delimiter, strict=True)
    except (csv.Error, ValueError) as error:
        problem = "a carriage return outside quotes" if "\r" in part[0][:-2] else str(error)
        return Record(first, last, [], problem)
    return Record(first, last, cells)


def _scan(line: str, inside: bool, delimiter: str) -> tuple[bool, bool]:
    """Whether a quoted cell is open after `line`, and whether the line has a misplaced quote."""
    if '"' not in line:
        return inside, False
    at, end = 0, len(line.rstrip("\r\n"))
    while True:
        if inside:
            at = line.find('"', at)
            if at < 0:
                return True, False
            if line[at + 1 : at + 2] == '"':
                at += 2
                continue
            inside, at = False, at + 1
            if at >= end:
                return False, False
            if line[at] != delimiter:
                return False, True
            at += 1
        elif line[at : at + 1] == '"':
            inside, at = True, at + 1
        else:
            at = line.find(delimiter, at) + 1
            if at == 0:
                return False, False


def _skip_region(source: _Lines, odd: bool, delimiter: str) -> bool:
    """Skip to the first line that is certainly outside a cell; False if the file ends inside one.

    Reads the lines ahead under two assumptions, that they start outside a cell and inside one, until a quote
    contradicts one of them: an opening quote is at the start of a cell, a closing quote at its end.
    """
    while True:
        ahead: list[str] = []
        possible = {"outside": True, "inside": True}
        is_open = {"outside": False, "inside": True}
        while all(possible.values()):
            line = next(source, None)
            if line is None:
                if is_open["outside"] or not odd:  # the assumption that ends outside a cell
                    started_outside = not is_open["outside"]
                    source.put_back(ahead if started_outside else [])
                    return True
                return False
            ahead.append(line)
            _follow(line, possible, is_open, delimiter)
        odd ^= sum(line.count('"') for line in ahead) % 2 == 1
        if possible["outside"]:
            source.put_back(ahead)
            return True
        if possible["inside"] and not is_open["inside"]:
            return True
        if possible["inside"]:  # that cell was closed, and another is open
            return _close(source, delimiter)


def _close(source: _Lines, delimiter: str) -> bool:
    """Read to the end of the record whose quoted cell is open; False if the file ends first."""
    inside, odd = True, True
    for line in source:
        inside, broken = _scan(line, inside, delimiter)
        odd ^= line.count('"') % 2 == 1
        if broken:
            return _skip_region(source, odd, delimiter)
        if not inside:
            return True
    return False


def _follow(line: str, possible: dict[str, bool], is_open: dict[str, bool], delimiter: str) -> None:
    end = len(line.rstrip("\r\n"))
    for run in _QUOTES.finditer(line):
        starts = run.start() == 0 or line[run.start() - 1] == delimiter
        ends = run.end() == end or line[run.end()] == delimiter
        odd = (run.end() - run.start()) % 2 == 1
        for name in possible:
            if is_open[name]:
                possible[name] &= not odd or ends
            else:
                possible[name] &= starts and (odd or ends)
            is_open[name] ^= odd
