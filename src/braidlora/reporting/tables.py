"""Tables of the page: what a cell says, how numbers are written, and which values may be called best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

UNKNOWN = "–"
Mark = Literal["", "above", "below"]


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what it says.
        detail: small print under it.
        mark: seen above or below the baseline.
        best: the highest of its kind, where that is more than chance.
    """

    text: str
    detail: str = ""
    mark: Mark = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One line: its heading and the cells right of it; `apart` sets off what is no method, such as the base model."""

    name: str
    cells: Sequence[Cell]
    detail: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Args:
        name: its anchor.
        caption: what it shows.
        columns: headings, the one above the row headings first.
        rows: each with one cell per column after the first.
        notes: what has to be said below it.
        text_columns: numbers of the columns that hold words, flush left; the others hold numbers.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)
    text_columns: Sequence[int] = (0,)


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number for readers: thousands apart, a true minus, no negative zero; a dash for None."""
    if value is None:
        return UNKNOWN
    rounded = round(value, digits) or 0.0
    return f"{rounded:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def spread(statistic: Mapping[str, Any] | None, digits: int = 1, *, sign: bool = False) -> str:
    """`mean ± std over seeds`; the mean alone where there is one seed, a dash where nothing is known."""
    if statistic is None or statistic["mean"] is None:
        return UNKNOWN
    text = number(statistic["mean"], digits, sign=sign)
    std = statistic["std_seeds"]
    if std is None or len(statistic["values"]) < 2:
        return text
    return f"{text} ± {number(std, digits)}"


def interval(difference: Mapping[str, Any] | None, digits: int = 1) -> str:
    """`mean [low, high]`, signed; without brackets where there is no interval."""
    if difference is None or difference["mean"] is None:
        return UNKNOWN
    text = number(difference["mean"], digits, sign=True)
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return text
    return f"{text} [{number(low, digits, sign=True)}, {number(high, digits, sign=True)}]"


def mark(difference: Mapping[str, Any] | None) -> Mark:
    """`above` or `below` where the interval of a difference excludes 0 and no run collapsed, else nothing."""
    if (
        difference is None
        or not difference.get("judged", True)
        or difference["low"] is None
        or difference["high"] is None
    ):
        return ""
    if difference["low"] > 0:
        return "above"
    return "below" if difference["high"] < 0 else ""


def best(means: Sequence[float | None], marks: Sequence[Mark], baseline: int | None) -> int | None:
    """Which row may be called best: the highest, where it is seen above the baseline, or is the baseline above all.

    Args:
        means: score of each row, None where unknown.
        marks: each row's `mark` against the baseline.
        baseline: number of the baseline's row, None where it has none.

    Returns:
        the number of the row, or None: the highest is not seen above the baseline, shares its value with another row,
        or is unknown.
    """
    known = [(value, row) for row, value in enumerate(means) if value is not None]
    if len(known) < 2:
        return None
    top, row = max(known)
    if sum(value == top for value, _ in known) > 1:
        return None
    if row == baseline:
        others = [marks[other] for _, other in known if other != baseline]
        return row if all(other == "below" for other in others) else None
    return row if marks[row] == "above" else None


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])
