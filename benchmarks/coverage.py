"""Coverage of the interval of a comparison, by simulation. Two minutes on one core.

    python benchmarks/coverage.py            # 10,000 comparisons per scenario
    python benchmarks/coverage.py --quick    # 400

Each scenario draws the paired differences of a comparison: S seeds, all tested on the same rows.

- `seeds dominate`, `rows dominate`, `both`: normal effects of seed, row and their interaction, one task of 200 rows.
- `one seed effect for 8 tasks`: a seed has the same effect on all eight tasks.
- `t(3)`: `seeds dominate`, with heavy-tailed effects (Student's t with 3 degrees of freedom).
- `binary, P%`: right or wrong answers of two methods that are right P% of the time, one 500-row task; rows differ in
  difficulty, methods in which rows are easy for them, and seeds slightly. `of 100 rows` has a smaller test set.
- `collapses`: one random seed in five drops by 25 points. A comparison counts as covered if the interval contains the
  difference between healthy runs or the comparison is flagged (`statistics.collapsed`); no interval covers a collapse
  that no seed has shown.

The results also have the mean width, how often a comparison is flagged, and `seed_means`, the coverage of Student's t
over the per-seed means alone. Results go to benchmarks/results/coverage.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from braidlora.comparison.statistics import collapsed, intervals
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
CONFIDENCE, TRUE, SEED = 0.95, 1.5, 0
SEEDS = (2, 3, 5)
COLLAPSE = 25.0

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], list[Floats]]


def normal(random: np.random.Generator, *size: int) -> Floats:
    return random.standard_normal(size)


def heavy(random: np.random.Generator, *size: int) -> Floats:
    """Student's t with 3 degrees of freedom, scaled to variance 1."""
    return random.standard_t(3, size) / math.sqrt(3.0)


def effects(
    of_seed: float, of_row: float, of_both: float, tasks: int = 1, rows: int = 200, law: Any = normal
) -> Draw:
    """Differences TRUE + seed + row + interaction, with these standard deviations; all tasks share the seed effect."""

    def draw(random: np.random.Generator, trials: int, seeds: int) -> list[Floats]:
        common = TRUE + of_seed * law(random, trials, seeds, 1)
        return [
            common + of_row * law(random, trials, 1, rows) + of_both * law(random, trials, seeds, rows)
            for _ in range(tasks)
        ]

    return draw


def answers(right: float, rows: int = 500) -> Draw:
    """100 · (right − right) of two equally accurate methods: logit = center + row + method × row + seed."""
    centre = _centre(right)

    def draw(random: np.random.Generator, trials: int, seeds: int) -> list[Floats]:
        of_row = centre + 2.0 * normal(random, trials, 1, rows)
        scores = []
        for _ in range(2):
            logit = of_row + normal(random, trials, 1, rows) + 0.2 * normal(random, trials, seeds, 1)
            scores.append(random.random((trials, seeds, rows)) < expit(logit))
        return [100.0 * (scores[1].astype(float) - scores[0])]

    return draw


def _centre(right: float) -> float:
    """The center of the logits that gives a mean accuracy of `right`, by bisection on a fixed sample."""
    scatter = math.sqrt(2.0**2 + 1.0 + 0.2**2) * np.random.default_rng(1).standard_normal(200_000)
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expit(middle + scatter).mean() < right else (low, middle)
    return low


def collapses(random: np.random.Generator, trials: int, seeds: int) -> list[Floats]:
    [scores] = effects(1.0, 25.0, 10.0)(random, trials, seeds)
    return [scores - COLLAPSE * (random.random((trials, seeds, 1)) < 0.2)]


TRUTHS: dict[str, tuple[Draw, float]] = {
    "seeds dominate": (effects(2.0, 5.0, 5.0), TRUE),
    "rows dominate": (effects(0.0, 30.0, 10.0), TRUE),
    "both": (effects(2.0, 25.0, 20.0), TRUE),
    "one seed effect for 8 tasks": (effects(2.0, 25.0, 20.0, tasks=8), TRUE),
    "t(3)": (effects(2.0, 5.0, 5.0, law=heavy), TRUE),
    "binary, 50%": (answers(0.50), 0.0),
    "binary, 95%": (answers(0.95), 0.0),
    "binary, 2%": (answers(0.02), 0.0),
    "binary, 2% of 100 rows": (answers(0.02, rows=100), 0.0),
    "collapses": (collapses, TRUE),
}


def coverage(name: str, seeds: int, trials: int) -> dict[str, Any]:
    """One cell of the table."""
    draw, true = TRUTHS[name]
    random = np.random.default_rng([SEED, seeds, *name.encode()])
    held = by_seeds = flagged = 0
    width = 0.0
    for start in range(0, trials, 100):
        tasks = draw(random, min(100, trials - start), seeds)
        found = [overall for overall, _ in intervals(tasks, same_rows=True, confidence=CONFIDENCE)]
        means = np.mean([scores.mean(axis=2) for scores in tasks], axis=0)
        reach = stdtrit(seeds - 1, (1 + CONFIDENCE) / 2) * means.std(axis=1, ddof=1) / math.sqrt(seeds)
        by_seeds += int((np.abs(means.mean(axis=1) - true) <= reach).sum())
        for interval, per_seed in zip(found, means, strict=True):
            flag = bool(collapsed(per_seed.tolist()))
            flagged += flag
            held += interval.low <= true <= interval.high or (flag and name == "collapses")
            width += interval.high - interval.low
    return {
        "truth": name,
        "seeds": seeds,
        "coverage": held / trials,
        "standard_error": math.sqrt(held / trials * (1 - held / trials) / trials),
        "width": width / trials,
        "flagged": flagged / trials,
        "seed_means": by_seeds / trials,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="400 comparisons per scenario; writes nothing")
    args = parser.parse_args()
    trials = 400 if args.quick else 10_000
    rows = []
    for name in TRUTHS:
        for seeds in SEEDS:
            rows.append(coverage(name, seeds, trials))
            row = rows[-1]
            print(
                f"{name:26s} {seeds} seeds: {row['coverage']:6.1%} ± {row['standard_error']:.1%}, width "
                f"{row['width']:5.1f}, flagged {row['flagged']:.1%}, t over seeds {row['seed_means']:.1%}",
                flush=True,
            )
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        result = {
            "kind": "coverage",
            "command": "python benchmarks/coverage.py",
            "environment": environment(),
            "confidence": CONFIDENCE,
            "trials": trials,
            "seed": SEED,
            "rows": rows,
        }
        (RESULTS / "coverage.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
