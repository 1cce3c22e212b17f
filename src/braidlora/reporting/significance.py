"""Which differences are significant, and which method may be called the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.tables import Mark


def mark(difference: Mapping[str, Any] | None) -> Mark:
    """`above` or `below` if the interval of a difference excludes 0 and no run collapsed; otherwise nothing."""
    if difference is None or not difference.get("judged", True):
        return ""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return ""
    return "above" if low > 0 else "below"


def best(means: Sequence[float | None], marks: Sequence[Mark], baseline: int | None) -> int | None:
    """The row that may be called best: the highest, if it is significantly above the baseline, or is the baseline and
    significantly above all others.

    Args:
        means: score of each row, None if unknown.
        marks: each row's `mark` against the baseline.
        baseline: number of the baseline's row, None if there is none.

    Returns:
        the number of the row; None if the highest is not significantly above the baseline, shares its value with
        another row, or is unknown.
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
