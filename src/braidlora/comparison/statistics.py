"""Means over seeds, and confidence intervals of the difference between two methods. No files, no methods.

The paired difference d of two methods on test row i with seed s follows a crossed random-effects model,

    d_si = δ + seed_s + row_i + error_si,   Var(mean) = σ²_seed/S + σ²_row/n + σ²_error/(S n),

whose two parts are estimated from mean squares: V_seed, the variance of the per-seed means over S (which includes the
error), and V_row = max(0, MS_row − MS_error)/(S n). The interval of δ is mean ± t(ν)·√(V_seed + V_row) with

    1/ν = (V_seed/V)^p/(S − 1) + (V_row/V)^p/m,   V = V_seed + V_row,   p = 2 − 3/S.

With p = 2 this is Satterthwaite's formula (Biometrics Bulletin 2, 1946), which treats the shares V_seed/V and V_row/V
as known. Three seeds estimate their share poorly, and coverage then is only 92%; p decreases with S so that coverage
stays near the nominal confidence. m counts the rows that carry the difference, (Σ r_i²)² / Σ r_i⁴ for row means r_i:
k rows that differ among n equal ones have k degrees of freedom, so five rows to none are not significant and six are,
as in a sign test.

`benchmarks/coverage.py` simulates how often the interval contains the true value; docs/reference/comparing.md
has the table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FULL_SCORE = 100.0
COLLAPSE_POINTS = 10.0
_APART = 3.0  # the gap to a collapsed group is this many times as wide as either group
_RULE_OF_THREE = 0.05
_TOO_FEW = 5  # 2 · 0.5⁵ > 0.05

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """`{"mean", "std_seeds", "values"}` of one number per seed.

    `std_seeds` is the sample standard deviation (divided by the number of seeds − 1), null with one seed. An
    unknown value is None; it stays in `values` and does not count in the other two.
    """
    known = [value for value in values if value is not None]
    mean = math.fsum(known) / len(known) if known else None
    std = None
    if mean is not None and len(known) > 1:
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return {"mean": mean, "std_seeds": std, "values": list(values)}


def intervals(
    differences: Sequence[Floats], *, same_rows: bool, confidence: float = 0.95
) -> list[tuple[Interval, list[Interval]]]:
    """For each method the interval of its mean difference over tasks, and one per task.

    With one seed, only the rows vary, and the interval says nothing about another seed.

    Args:
        differences: one array (R, S, n_t) per task: for each of R methods and S seeds, the paired differences of its
            scores to the baseline's on the task's n_t test rows.
        same_rows: all seeds were tested on the same rows, so the effect of the rows is common to them. Otherwise every
            seed has its own rows, and the interval is the wider of Student's t over the per-seed means and the one from
            the rows of all seeds together.
        confidence: probability that the interval contains the true difference, e.g. 0.95.
    """
    found = []
    for method in range(differences[0].shape[0]):
        tasks = [scores[method] for scores in differences]
        overall = _interval(tasks, same_rows, confidence)
        found.append((overall, [_interval([one], same_rows, confidence) for one in tasks]))
    return found


def _interval(tasks: Sequence[Floats], same_rows: bool, confidence: float) -> Interval:
    """The interval of the mean over equally weighted tasks; one array (S, n_t) per task."""
    seeds, count = len(tasks[0]), len(tasks)
    per_seed = np.mean([scores.mean(axis=1) for scores in tasks], axis=0)
    mean = float(per_seed.mean())
    of_seeds = float(per_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    crossed = same_rows or seeds == 1
    parts = [_row_part(scores if crossed else scores.reshape(1, -1)) for scores in tasks]
    of_rows = sum(variance for variance, _ in parts) / count**2
    carried = sum((variance / count**2) ** 2 / rows for variance, rows in parts)
    row_freedom = of_rows**2 / carried if carried > 0 else 1.0
    if crossed:
        reach = _reach(of_seeds, of_rows, seeds - 1, row_freedom, confidence)
    else:
        reach = max(
            _reach(of_seeds, 0.0, seeds - 1, 1.0, confidence),
            _reach(0.0, of_rows, 0, row_freedom, confidence),
        )
    # Rows that all agree do not prove that others would: with n equal rows, up to about 3/n may still differ.
    least = math.sqrt(sum(_least(scores, crossed) ** 2 for scores in tasks)) / count
    reach = max(reach, least)
    return Interval(mean, mean - reach, mean + reach)


def _row_part(scores: Floats) -> tuple[float, float]:
    """V_row of one task's (S, n) differences, and its degrees of freedom m."""
    seeds, rows = scores.shape
    if rows < 2:
        return 0.0, 1.0
    of_row = scores.mean(axis=0)
    error = scores - of_row - scores.mean(axis=1, keepdims=True) + scores.mean()
    of_error = float((error**2).sum()) / ((seeds - 1) * (rows - 1)) if seeds > 1 else 0.0
    variance = max(0.0, seeds * float(of_row.var(ddof=1)) - of_error) / (seeds * rows)
    squares = of_row**2
    fourth = float((squares**2).sum())
    return variance, float(squares.sum()) ** 2 / fourth if fourth > 0 else 1.0


def _reach(
    of_seeds: float, of_rows: float, seed_freedom: int, row_freedom: float, confidence: float
) -> float:
    """Half the width of the interval: t(ν)·√(V_seed + V_row)."""
    variance = of_seeds + of_rows
    if variance == 0.0:
        return 0.0
    power = 2.0 - 3.0 / (seed_freedom + 1) if seed_freedom else 1.0
    inverse = (of_rows / variance) ** power / row_freedom
    if of_seeds > 0.0:
        inverse += (of_seeds / variance) ** power / seed_freedom
    return t_quantile(confidence, 1.0 / inverse) * math.sqrt(variance)


def _least(scores: Floats, crossed: bool) -> float:
    """The rule of three: what n rows cannot rule out, in units of the largest observed difference (or a full score).

    Up to five rows rule out nothing: even if all favor one method, a sign test finds that not significant.
    """
    largest = float(np.abs(scores).max()) or FULL_SCORE
    rows = scores.shape[1] if crossed else scores.size
    if rows <= _TOO_FEW:
        return largest
    return largest * (1.0 - _RULE_OF_THREE ** (1.0 / rows))


def t_quantile(confidence: float, degrees: float) -> float:
    """The t with P(|T| < t) = `confidence` for Student's T with `degrees` of freedom, integer or not."""
    from scipy.special import stdtrit  # slow to import, and only comparisons need it

    return float(stdtrit(degrees, (1.0 + confidence) / 2.0))


def collapsed(values: Sequence[float]) -> list[int]:
    """Which seeds fell far below the others: positions in `values`, empty if the values form one group.

    The sorted values are cut at their widest gap. The lower group has collapsed if the gap is wider than ten
    points and more than three times as wide as either group. At least three values are needed; fewer have no
    meaningful spread.
    """
    if len(values) < 3:
        return []
    order = sorted(range(len(values)), key=lambda position: values[position])
    ranked = [values[position] for position in order]
    gaps = [high - low for low, high in itertools.pairwise(ranked)]
    cut = max(range(len(gaps)), key=lambda position: gaps[position])
    widest = max(ranked[cut] - ranked[0], ranked[-1] - ranked[cut + 1])
    if gaps[cut] <= COLLAPSE_POINTS or gaps[cut] <= _APART * widest:
        return []
    return sorted(order[: cut + 1])
