"""Means over seeds, and how sure a difference between two methods is. Pure numpy: no files, no methods.

Two things make a difference uncertain: another seed would have trained another model, and other test rows would have
been easier for one of the two. The interval has to hold both, and few seeds are the rule.

- A hierarchical bootstrap draws seeds and rows anew. From three seeds it can draw no spread that the three do not show,
  so it is too narrow where the seeds decide.
- Student's t on the per-seed differences is right for few seeds, but does not see that all seeds were tested on the
  same rows.

So an interval here reaches as far as the wider of the two, on each side. Where the two methods differ on a handful of
rows only, a bootstrap is sure too early: four rows of a hundred to none would already be "better". As Agresti and Min
do for paired proportions, two rows are added before drawing, one in favour of each method, as large as the largest
difference seen (a whole row, 100 points, where none is). Then five rows to none are no difference yet and six are, as
in a sign test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
FULL_SCORE = 100.0
_MANY = 1000  # rows of a task
_CHUNK = 4_000_000  # counts of drawn rows that are held in memory at a time

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean and the interval that holds the true value with the confidence asked for."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """`{"mean", "std_seeds", "values"}` of one number per seed.

    `std_seeds` is the sample standard deviation (divided by the number of seeds − 1), null with one seed. A value that
    is not known is None; it stays in `values` and is left out of the other two.
    """
    known = [value for value in values if value is not None]
    mean = math.fsum(known) / len(known) if known else None
    std = None
    if mean is not None and len(known) > 1:
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return {"mean": mean, "std_seeds": std, "values": list(values)}


def bootstrap(differences: Sequence[Floats], *, same_rows: bool, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Hierarchical bootstrap: seeds are drawn with replacement, and for each of them test rows.

    Args:
        differences: one array (R, S, n_t) per task: of each of R methods, for each of S seeds, the paired differences
            of its scores to the baseline's on the task's n_t test rows.
        same_rows: all seeds were tested on the same rows. Then a draw takes one set of rows for all its seeds, since
            their luck is common; otherwise every drawn seed gets rows of its own.
        draws: bootstrap samples.
        seed: of the random numbers; the same seed gives the same draws.

    Returns:
        (draws, R, T): mean differences per method and task.
    """
    random = np.random.default_rng(seed)
    methods, seeds, _ = differences[0].shape
    drawn = random.integers(seeds, size=(draws, seeds))
    means = np.empty((draws, methods, len(differences)))
    for task, scores in enumerate(differences):
        largest = np.abs(scores).max(axis=(1, 2), keepdims=True).repeat(seeds, axis=1)
        # Rows that all agree do not prove that all would.
        largest = np.where(largest > 0, largest, FULL_SCORE)
        scores = np.concatenate([scores, largest, -largest], axis=2)
        rows = scores.shape[2]
        # Rows with the same differences are drawn as one kind: where scores are right or wrong, there are few kinds.
        kinds, counts = np.unique(scores.reshape(methods * seeds, rows).T, axis=0, return_counts=True)
        step = max(1, _CHUNK // len(kinds))
        for start in range(0, draws, step):
            chosen = drawn[start : start + step]
            total = np.zeros((len(chosen), methods))
            for place in range(seeds):
                if place == 0 or not same_rows:
                    times = _times_drawn(random, counts, len(chosen))
                    per_seed = (times @ kinds / rows).reshape(-1, methods, seeds)
                total += np.take_along_axis(per_seed, chosen[:, None, place : place + 1], axis=2)[..., 0]
            means[start : start + step, :, task] = total / seeds
    return means


def _times_drawn(random: np.random.Generator, counts: NDArray[np.int64], draws: int) -> Floats:
    """How often each kind of rows is drawn where as many rows are drawn as there are: (draws, kinds).

    A multinomial takes its time per kind; where nearly every row of many is a kind of its own (ROUGE scores, say),
    drawing the rows one by one is several times as fast.
    """
    rows = int(counts.sum())
    if rows < _MANY or 2 * len(counts) < rows:
        return random.multinomial(rows, counts / rows, size=draws).astype(float)
    kind_of_row = np.repeat(np.arange(len(counts)), counts)
    times = np.empty((draws, len(counts)))
    for draw in range(draws):
        times[draw] = np.bincount(kind_of_row[random.integers(rows, size=rows)], minlength=len(counts))
    return times


def intervals(
    differences: Sequence[Floats],
    *,
    same_rows: bool,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[tuple[Interval, list[Interval]]]:
    """For each method the interval of its mean difference over tasks, and one per task; arguments as in `bootstrap`.

    Each side reaches as far as the percentile bootstrap or Student's t on the per-seed differences, whichever is wider.
    With one seed only the rows are drawn, and the interval says nothing about another seed.
    """
    drawn = bootstrap(differences, same_rows=same_rows, draws=draws, seed=seed)
    per_seed = np.stack([scores.mean(axis=2) for scores in differences], axis=2)  # (R, S, T)
    found = []
    for method in range(per_seed.shape[0]):
        overall = _interval(per_seed[method].mean(axis=1), drawn[:, method].mean(axis=1), confidence)
        tasks = [
            _interval(per_seed[method, :, task], drawn[:, method, task], confidence)
            for task in range(len(differences))
        ]
        found.append((overall, tasks))
    return found


def _interval(per_seed: Floats, drawn: Floats, confidence: float) -> Interval:
    mean = float(per_seed.mean())
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    seeds = len(per_seed)
    reach = 0.0
    if seeds > 1:
        reach = t_quantile(confidence, seeds - 1) * float(per_seed.std(ddof=1)) / math.sqrt(seeds)
    return Interval(mean, min(float(low), mean - reach), max(float(high), mean + reach))


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| < t) = `confidence` for Student's T with a whole number of degrees of freedom.

    With θ = atan(t / √ν) the probability is a finite sum of powers of cos θ (Abramowitz and Stegun 26.7.3 and 26.7.4);
    it is inverted by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _t_probability(theta: float, degrees: int) -> float:
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2 == 1
    power, total, factor = (cosine if odd else 1.0), 0.0, 1.0
    for step in range(degrees // 2):
        total += factor * power
        power *= cosine * cosine
        numerator = 2 * step + (2 if odd else 1)
        factor *= numerator / (numerator + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
