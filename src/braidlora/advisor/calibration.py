"""What the probe's measurements predicted on suites whose outcome is known. No torch.

A rule is one measurement and one threshold: below it one method, above it another. `benchmarks/advise.py` fits it on
all suites but one and asks what it would have advised for that one; `calibration.json` is what came out. A pick is good
if the comparison of that suite does not show it to be worse than its best method.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "calibration.json"
# What to share, by the method of a comparison.
SHARES: dict[str, str] = {
    "lora": "both",
    "lora-matched": "both, at a higher rank",
    "hydralora": "A",
    "moelora": "nothing",
    "alora": "B",
}


@dataclass(frozen=True)
class Suite:
    """A suite of tasks with a known outcome.

    Attributes:
        name: of its table.
        family: suites that share tasks or base.
        measures: of its probe, see `MEASURES`.
        points: how far each method's mean is behind the best one's, by method; only those that the table has.
        good: the methods that are not significantly worse than the best.
    """

    name: str
    family: str
    measures: Mapping[str, float | None]
    points: Mapping[str, float]
    good: Sequence[str]


@dataclass(frozen=True)
class Rule:
    """`below` where the measurement is below the threshold, otherwise `above`; without a measurement, one method."""

    measure: str | None
    threshold: float
    below: str
    above: str

    def pick(self, measures: Mapping[str, float | None]) -> str:
        """The method that the rule advises; `above` where the measurement is not known."""
        value = None if self.measure is None else measures[self.measure]
        return self.below if value is not None and value < self.threshold else self.above


def always(method: str) -> Rule:
    """The rule that measures nothing."""
    return Rule(None, 0.0, method, method)


def fit(suites: Sequence[Suite], measure: str, methods: Sequence[str]) -> Rule:
    """The threshold and the two methods with the fewest points behind the best, summed over the suites.

    A suite whose table lacks a method counts for it with the mean of that method in the others.
    """
    known = sorted({value for suite in suites if (value := suite.measures[measure]) is not None})
    cuts = [(low + high) / 2 for low, high in itertools.pairwise(known)] or [math.inf]
    costs = {
        rule: sum(_points(suite, rule.pick(suite.measures), suites) for suite in suites)
        for cut in cuts
        for rule in (Rule(measure, cut, below, above) for below in methods for above in methods)
    }
    return min(costs, key=costs.__getitem__)


def fit_always(suites: Sequence[Suite], methods: Sequence[str]) -> Rule:
    """The one method with the fewest points behind the best, summed over the suites."""
    costs = {method: sum(_points(suite, method, suites) for suite in suites) for method in methods}
    return always(min(costs, key=costs.__getitem__))


def _points(suite: Suite, method: str, suites: Sequence[Suite]) -> float:
    if method in suite.points:
        return suite.points[method]
    others = [other.points[method] for other in suites if method in other.points]
    return sum(others) / len(others) if others else math.inf


def wilson(good: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% CI of a proportion (Wilson's score interval)."""
    if of == 0:
        return 0.0, 1.0
    share, size = good / of, 1 + z * z / of
    middle = (share + z * z / (2 * of)) / size
    reach = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / size
    return max(0.0, middle - reach), min(1.0, middle + reach)


def read_calibration() -> dict[str, Any]:
    """The package's own, see docs/reference/advising.md."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content
