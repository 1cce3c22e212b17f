"""Comparison of rules on real data: several federations per rule, one per seed, with their scores and bytes.

    python benchmarks/rules_side_by_side.py fed-sentences  # all rules, six clients by task: 2 hours on two cores
    python benchmarks/rules_side_by_side.py fed-dirichlet  # ten clients of one task, divided by labels
    python benchmarks/rules_side_by_side.py fed-flan8  # the FLAN clients, equal and mixed ranks: loss, bytes
    python benchmarks/rules_side_by_side.py fed-induction --plan  # SmolLM2, tuned per rule: what it will cost
    python benchmarks/rules_side_by_side.py fed-flan8-smollm2 --plan  # the FLAN clients with all rows, tuned
    python benchmarks/rules_side_by_side.py fed-sentences --seeds 0  # some seeds first; the others later

Every federation is a `braidlora federate` with its output under runs/TABLE; finished ones are reused and interrupted
ones resume. Scores are those of the aggregated models on the clients' own test rows. Δm% is measured against the row
`local` of the same group, seed by seed. Differences from the group's baseline, and within selected pairs of rows, are
paired by seed and test row.

A table with learning rates to try (fed-induction, fed-flan8-smollm2) first trains every row with each of them on the
first seed, scored on rows held out of the training rows; the highest score decides, then all seeds are trained at that
rate.

Results go to benchmarks/results/TABLE.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import data_folder  # noqa: F401
from braidlora.comparison.statistics import intervals, summary, t_quantile
from braidlora.config import FederatedConfig, load_config
from braidlora.evaluation.balance import delta_m
from braidlora.runs import FederatedDirectory, environment, read_json, read_jsonl
from federated_tables import TABLES, Table

RESULTS = Path(__file__).parent / "results"
RATE = "training.learning_rate"
_DIVERGED = (4, 6)  # exit codes: a loss is not finite; too few updates are usable
_PLAIN = str.maketrans({" ": "", ",": "_", "α": "alpha", "∞": "inf"})


@dataclass(frozen=True)
class Federation:
    """One federation of a table."""

    recipe: str
    row: str
    seed: int
    options: list[str]
    may_fail: bool = False  # a learning rate may be too high

    @property
    def directory(self) -> FederatedDirectory:
        return FederatedDirectory(Path(self.options[-1].removeprefix("--output=")))

    def is_finished(self) -> bool:
        """Whether it exists with the same recipe."""
        return self.directory.state() == "finished" and load_config(
            str(self.directory.config), [], FederatedConfig
        ) == load_config(self.recipe, self.options, FederatedConfig)

    def run(self) -> None:
        """Train it, unless it is finished.

        Raises:
            SystemExit: the command failed, after printing why.
        """
        if self.is_finished():
            return
        start = time.monotonic()
        words = ["federate", self.recipe, *self.options, "--resume=auto", "--json"]
        done = subprocess.run([sys.executable, "-m", "braidlora", *words], stdout=subprocess.DEVNULL)
        if done.returncode and not (self.may_fail and done.returncode in _DIVERGED):
            raise SystemExit(f"braidlora {' '.join(words)}: exit code {done.returncode}")
        print(f"{self.row}, seed {self.seed}: {time.monotonic() - start:.0f} s", flush=True)

    def metrics(self) -> dict[str, Any]:
        return read_json(self.directory.metrics)

    def score(self) -> float:
        """Mean over the clients; −∞ where training diverged."""
        if self.directory.state() != "finished":
            return -math.inf
        return float(self.metrics()["mean"])

    def scores(self) -> dict[str, list[float]]:
        """Score of every test row by client and task, of the aggregated models."""
        found = {}
        for path in sorted(self.directory.path.glob("clients/*/predictions/*.jsonl")):
            name = f"{path.parent.parent.name}/{path.stem}"
            found[name] = [row["score"] for row in read_jsonl(path)]
        return found

    def test_rows(self) -> dict[str, str]:
        """Digest of the test rows by client and task."""
        return {
            f"{name}/{task}": rows["test"]["sha256"]
            for name, client in read_json(self.directory.partition).items()
            for task, rows in client["tasks"].items()
            if "test" in rows
        }

    def losses(self) -> dict[str, float]:
        """Mean training loss over the clients in the first and in the last round."""
        lines = read_jsonl(self.directory.log)
        means = [float(np.mean([one["loss"] for one in line["clients"].values()])) for line in lines]
        return {"first": means[0], "last": means[-1]}


def federations(
    root: Path, table: Table, seeds: Sequence[int], rates: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, list[Federation]]]:
    """All federations of a table by group and row, a list over the seeds.

    Args:
        rates: the learning rate of each group's rows; none where the recipe's is used.
    """
    return {
        title: {
            row: [
                _federation(root, table, title, row, seed, _of_rate(rates.get(title, {}).get(row)))
                for seed in seeds
            ]
            for row in group.rows
        }
        for title, group in table.groups.items()
    }


def trials(root: Path, table: Table) -> dict[str, dict[str, dict[float, Federation]]]:
    """The federations that tune the learning rate, by group, row and rate."""
    return {
        title: {
            row: {
                rate: _federation(
                    root / "tuning",
                    table,
                    title,
                    row,
                    table.seeds[0],
                    [*table.held_out, *_of_rate(rate)],
                    f"-{rate:g}",
                )
                for rate in (*table.rates, *table.more_rates.get(row, ()))
            }
            for row in group.rows
        }
        for title, group in table.groups.items()
        if table.rates
    }


def _of_rate(rate: float | None) -> list[str]:
    return [] if rate is None else [f"--{RATE}={rate:g}"]


def _federation(
    root: Path, table: Table, title: str, row: str, seed: int, more: list[str], suffix: str = ""
) -> Federation:
    group = table.groups[title]
    stem = "-".join([title, row] if title else [row]).translate(_PLAIN)
    output = f"--output={root}/{stem}{suffix}-seed{seed}"
    return Federation(
        table.recipe,
        row,
        seed,
        [*table.options, *group.options, *group.rows[row], *more, f"--seed={seed}", output],
        may_fail=bool(suffix),
    )


def best_rates(tried: Mapping[str, Mapping[str, Mapping[float, Federation]]]) -> dict[str, dict[str, float]]:
    """The rate with the highest mean score on held-out rows, by group and row; the lowest of several."""
    return {
        title: {
            row: max(sorted(by_rate), key=lambda rate: by_rate[rate].score()) for row, by_rate in rows.items()
        }
        for title, rows in tried.items()
    }


def plan(root: Path, table: Table, seeds: Sequence[int]) -> str:
    """The budget: federations, how many are done, and the hours that are left."""
    tried = [
        one for rows in trials(root, table).values() for by_rate in rows.values() for one in by_rate.values()
    ]
    rows = sum(len(group.rows) for group in table.groups.values())
    of_seeds = [path.parent for path in root.glob("*-seed*/metrics.json")]
    done = [one.directory.path for one in tried if one.directory.state() == "finished"]
    minutes = [read_json(folder / "metrics.json")["seconds"] / 60 for folder in [*done, *of_seeds]]
    each = float(np.mean(minutes)) if minutes else table.minutes
    left = len(tried) - len(done) + max(0, rows * len(seeds) - len(of_seeds))
    return (
        f"tuning {len(tried)} federations, {len(done)} done; main {rows * len(seeds)}, {len(of_seeds)} done; "
        f"{each:.1f} min each ({'measured' if minutes else 'expected'}), {left * each / 60:.1f} h of one core left"
    )


def entry(runs: list[Federation], references: list[Federation] | None) -> dict[str, Any]:
    """The numbers of a row, each with mean, standard deviation over seeds, and values."""
    all_metrics = [one.metrics() for one in runs]
    alone = [one.metrics() for one in references] if references else []

    def spread(*keys: str) -> dict[str, Any]:
        values = []
        for metrics in all_metrics:
            for key in keys:
                metrics = None if metrics is None else metrics.get(key)
            values.append(metrics)
        return summary(values)

    changes = [
        delta_m(
            {name: mean for name, client in own["clients"].items() if (mean := client["mean"]) is not None},
            {name: client["mean"] for name, client in reference["clients"].items()},
        ).value
        for own, reference in zip(all_metrics, alone, strict=False)
    ]
    first = all_metrics[0]
    rounds = first["rounds"] * len(first["clients"])
    losses = [one.losses() for one in runs]
    return {
        "rule": first["rule"],
        "ranks": [client["rank"] for client in first["clients"].values()],
        "before": spread("before", "mean"),
        "after": spread("after", "mean"),
        "mean": spread("mean"),
        "worst": spread("worst"),
        "common": spread("common", "aggregated"),
        "delta_m": summary(changes) if changes else None,
        "loss": {which: summary([one[which] for one in losses]) for which in ("first", "last")},
        "bytes": first["bytes"],
        "bytes_per_client_and_round": {way: sent / rounds for way, sent in first["bytes"].items()},
        "seconds": spread("seconds"),
        "clients": {
            name: summary([metrics["clients"][name]["mean"] for metrics in all_metrics])
            for name in first["clients"]
        },
    }


def differences(rows: dict[str, list[Federation]], baseline: str) -> dict[str, dict[str, Any]]:
    """Mean and 95% CI of a row's difference from the baseline, for the mean over clients and by client.

    Clients have one task each. If each seed divides the rows differently, clients differ between seeds: the interval is
    then Student's t over the seeds' differences, with none by client.
    """
    others = [row for row in rows if row != baseline]
    every = [one for runs in rows.values() for one in runs]
    if any(one.test_rows() != every[0].test_rows() for one in every):
        return {
            row: {"overall": over_seeds(rows[row], rows[baseline], "mean"), "clients": {}} for row in others
        }
    own = {row: [one.scores() for one in runs] for row, runs in rows.items()}
    names = list(own[baseline][0])
    stacked = {row: [np.array([one[name] for one in runs]) for name in names] for row, runs in own.items()}
    paired = [
        np.stack([stacked[row][at] - stacked[baseline][at] for row in others]) for at in range(len(names))
    ]
    return {
        row: {
            "overall": overall._asdict(),
            "clients": {
                name.partition("/")[0]: one._asdict() for name, one in zip(names, by_client, strict=True)
            },
        }
        for row, (overall, by_client) in zip(others, intervals(paired, same_rows=True), strict=True)
    }


def over_seeds(runs: list[Federation], others: list[Federation], *keys: str) -> dict[str, float] | None:
    """Mean and 95% CI over seeds of the difference in one number of `metrics.json`.

    None if it was not measured, or with fewer than two seeds.
    """
    found = []
    for one, other in zip(runs, others, strict=True):
        pair = []
        for federation in (one, other):
            value: Any = federation.metrics()
            for key in keys:
                value = None if value is None else value.get(key)
            pair.append(value)
        if None in pair:
            return None
        found.append(pair[0] - pair[1])
    mean, seeds = float(np.mean(found)), len(found)
    if seeds < 2:
        return None
    reach = t_quantile(0.95, seeds - 1) * float(np.std(found, ddof=1)) / seeds**0.5
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def of_pair(rows: dict[str, list[Federation]], row: str, other: str) -> dict[str, Any]:
    """The difference between two rows."""
    found = differences({row: rows[row], other: rows[other]}, other)[row]
    common = over_seeds(rows[row], rows[other], "common", "aggregated")
    return {
        "row": row,
        "to": other,
        "difference": found["overall"],
        "common": common,
        "clients": found["clients"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--seeds", help="e.g. 0,1,2; default: the table's")
    parser.add_argument("--workers", type=int, default=2, help="federations to run in parallel")
    parser.add_argument("--plan", action="store_true", help="only print the budget")
    args = parser.parse_args()
    table, root = TABLES[args.table], Path("runs", args.table)
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else list(table.seeds)
    if args.plan:
        print(plan(root, table, seeds))
        return
    command = " ".join(["python benchmarks/rules_side_by_side.py", *sys.argv[1:]])
    result = measure(root, table, seeds, args.workers, command)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.table}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


def measure(root: Path, table: Table, seeds: list[int], workers: int, command: str) -> dict[str, Any]:
    """Train what is missing of a table, and return its numbers."""
    tried = trials(root, table)
    with ThreadPoolExecutor(workers) as pool:
        every = [one for rows in tried.values() for by_rate in rows.values() for one in by_rate.values()]
        list(pool.map(Federation.run, every))
        rates = best_rates(tried)
        found = federations(root, table, seeds, rates)
        in_order = [rows[row][at] for at in range(len(seeds)) for rows in found.values() for row in rows]
        list(pool.map(Federation.run, in_order))
    groups = {}
    for title, rows in found.items():
        baseline = table.groups[title].baseline
        differ = differences(rows, baseline)
        groups[title] = {
            "baseline": baseline,
            "pairs": [of_pair(rows, *pair) for pair in table.groups[title].pairs],
            "options": table.groups[title].options,
            "rows": {
                row: {
                    "options": [
                        *table.groups[title].rows[row], *_of_rate(rates.get(title, {}).get(row))
                    ],
                    **entry(runs, rows.get("local")),
                    "difference": differ[row]["overall"] if row in differ else None,
                    "tuning": {
                        f"{rate:g}": one.score() if one.is_finished() else None
                        for rate, one in tried.get(title, {}).get(row, {}).items()
                    },
                }
                for row, runs in rows.items()
            },
        }  # fmt: skip
    return {
        "kind": "federations",
        "command": command,
        "environment": environment(),
        "recipe": table.recipe,
        "options": table.options,
        "seeds": seeds,
        "at_a_time": workers,
        "scored": table.scored,
        "groups": groups,
    }


if __name__ == "__main__":
    main()
