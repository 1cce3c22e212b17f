"""Tables and numbers as readers see them: plain text for a terminal, Markdown, and the tables of the HTML page."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

UNKNOWN = "–"
Mark = Literal["", "above", "below"]
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class TableCell:
    """A cell of a table with more than a text.

    Args:
        text: the text.
        detail: small print below it.
        mark: significantly above or below the baseline.
        best: the highest of its kind, significantly.
    """

    text: str
    detail: str = ""
    mark: Mark = ""
    best: bool = False


@dataclass(frozen=True)
class TableRow:
    """A line: its heading and the cells to the right; `apart` sets off rows that are not methods or clients."""

    name: str
    cells: Sequence[str | TableCell]
    detail: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the HTML page.

    Args:
        name: its anchor.
        caption: what it shows.
        columns: headings; the first is above the row headings.
        rows: one cell per column after the first.
        notes: shown below the table.
        text_columns: numbers of the columns that hold words and are flush left; the others hold numbers.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    notes: Sequence[str] = ()
    text_columns: Collection[int] = (0,)


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    left: Collection[int] = (0,),
    rules: Collection[int] = (),
) -> str:
    """A table in plain text.

    Args:
        header: one title per column.
        rows: cells; floats are shown with one decimal, None as a dash.
        left: numbers of the columns that are flush left; the others are flush right.
        rules: numbers of the rows above which a line is drawn, in addition to the one below the header.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    lines = [list(header), *_texts(header, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [part for at, line in enumerate(aligned[1:]) for part in ([rule, line] if at in rules else [line])]
    return "\n".join([aligned[0], rule, *body])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same table in Markdown; the first column is flush left."""
    align = ["---", *["---:"] * (len(header) - 1)]
    lines = [list(header), *_texts(header, rows)]
    written = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
    return "\n".join([written[0], f"|{'|'.join(align)}|", *written[1:]])


def _texts(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[list[str]]:
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(header)}")
    return [
        [number(cell) if cell is None or isinstance(cell, float) else str(cell) for cell in row]
        for row in rows
    ]


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number with thousands separators and without a negative zero; a dash for None."""
    if value is None:
        return UNKNOWN
    return f"{round(value, digits) or 0.0:{'+' if sign else ''},.{digits}f}"


def spread(statistic: Mapping[str, Any] | None, digits: int = 1, *, sign: bool = False) -> str:
    """`mean ± std over seeds` of `{"mean", "std_seeds"}`; the mean alone with one seed, a dash if it is unknown."""
    if statistic is None or statistic["mean"] is None:
        return UNKNOWN
    text = number(statistic["mean"], digits, sign=sign)
    return text if statistic["std_seeds"] is None else f"{text} ± {number(statistic['std_seeds'], digits)}"


def interval(difference: Mapping[str, Any] | None, digits: int = 1) -> str:
    """`mean [low, high]` of a difference, signed; without brackets if it has no interval."""
    if difference is None or difference["mean"] is None:
        return UNKNOWN
    mean, low, high = (
        None if difference[key] is None else number(difference[key], digits, sign=True)
        for key in ("mean", "low", "high")
    )
    return f"{mean}" if low is None or high is None else f"{mean} [{low}, {high}]"


def format_bytes(count: float) -> str:
    """`12.3 MB`, in powers of a thousand."""
    for unit in _BYTE_UNITS:
        if count < 1000 or unit == _BYTE_UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def plural(count: int, noun: str) -> str:
    """`1 run`, `1,200 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])


def epsilon_text(epsilon: float | None) -> str:
    """An ε, rounded up so that it does not promise too much; None is infinity."""
    if epsilon is None:
        return "∞"
    digits = 2 if epsilon < 100 else 0
    up = 10**digits
    return f"{-(-epsilon * up // 1) / up:.{digits}f}"
