"""Comparison of rules on real data: several federations per rule, one per seed, with their scores and bytes.

    python benchmarks/rules_side_by_side.py fed-sentences  # all rules, six clients by task: 2 hours on two cores
    python benchmarks/rules_side_by_side.py fed-dirichlet  # ten clients of one task, divided by labels
    python benchmarks/rules_side_by_side.py fed-flan8  # the FLAN clients, equal and mixed ranks: loss, bytes
    python benchmarks/rules_side_by_side.py fed-sentences --seeds 0  # some seeds first; the others later

Every federation is a `braidlora federate` with its output under runs/TABLE; finished ones are reused and interrupted
ones resume. Scores are those of the aggregated models on the clients' own test rows. Δm% is measured against the row
`local` of the same group, seed by seed. Differences from the group's baseline, and within selected pairs of rows, are
paired by seed and test row.

Results go to benchmarks/results/TABLE.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import data_folder  # noqa: F401
from braidlora.comparison.statistics import intervals, summary, t_quantile
from braidlora.config import FederatedConfig, load_config
from braidlora.evaluation.balance import delta_m
from braidlora.runs import FederatedDirectory, environment, read_json, read_jsonl

RESULTS = Path(__file__).parent / "results"
INDEPENDENT = "--federation.client_init=independent"
_PLAIN = str.maketrans({" ": "", ",": "_", "α": "alpha", "∞": "inf"})


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other, with the same clients and test rows.

    Args:
        rows: recipe overrides by row name; `local` is the reference for Δm%.
        baseline: the row that the others are compared with.
        options: overrides for all rows.
        pairs: (row, other row) to compare as well, overall and by client.
    """

    rows: dict[str, list[str]]
    baseline: str
    options: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        recipe: name of a built-in recipe.
        groups: by title.
        seeds: the default seeds.
        options: overrides for all rows.
        scored: whether scores are meaningful; if not, only loss, bytes and time are shown.
    """

    recipe: str
    groups: dict[str, Group]
    seeds: tuple[int, ...]
    options: list[str] = field(default_factory=list)
    scored: bool = True


def rule(name: str, *more: str) -> list[str]:
    return [f"--federation.rule={name}", *more]


MIXED = "--federation.ranks=[16, 16, 8, 8, 4, 4]"
TABLES = {
    "fed-sentences": Table(
        "fed_sentences",
        {
            "": Group(
                {
                    "local": rule("local"),
                    "fedit": rule("fedit"),
                    "ffa-lora": rule("ffa-lora"),
                    "fedsa-lora": rule("fedsa-lora"),
                    "fed-alora": rule("fed-alora"),
                    "flora": rule("flora"),
                    "flexlora": rule("flexlora"),
                    "fedsa-lora, A independent": rule("fedsa-lora", INDEPENDENT),
                    "fed-alora, A independent": rule("fed-alora", INDEPENDENT),
                    "zero-padding, mixed ranks": rule("zero-padding", MIXED),
                    "flora, mixed ranks": rule("flora", MIXED),
                    "flexlora, mixed ranks": rule("flexlora", MIXED),
                    "fed-alora-het, mixed ranks": rule(
                        "fed-alora-het", MIXED, "--federation.r_intermediate=8"
                    ),
                },
                baseline="fedit",
                pairs=[
                    ("fed-alora", "fedsa-lora"),
                    ("fed-alora, A independent", "fedsa-lora, A independent"),
                    ("fed-alora, A independent", "fed-alora"),
                    ("fed-alora", "local"),
                    ("fedsa-lora", "local"),
                    ("flora", "local"),
                    ("fed-alora", "flora"),
                    ("fed-alora", "flexlora"),
                    ("fedsa-lora, A independent", "fedsa-lora"),
                    ("fed-alora-het, mixed ranks", "zero-padding, mixed ranks"),
                    ("fed-alora-het, mixed ranks", "flora, mixed ranks"),
                    ("fed-alora-het, mixed ranks", "local"),
                ],
            )
        },
        (0, 1, 2),
        [
            "--federation.rounds=3", "--training.batch_size=8", "--federation.evaluate_every=0",
            "--tasks.*.test.limit=300", "--prompt.cutoff=32",
        ],
    ),
    "fed-dirichlet": Table(
        "fed_sentences_dirichlet",
        {
            title: Group(
                {
                    "local": rule("local", "--federation.share_head=false"),
                    **{name: rule(name) for name in ("fedit", "ffa-lora", "fedsa-lora", "fed-alora")},
                },
                baseline="fedit",
                options=options,
                pairs=[
                    ("fed-alora", "fedsa-lora"),
                    ("fed-alora", "fedit"),
                    ("fed-alora", "local"),
                    ("fedsa-lora", "local"),
                ],
            )
            for title, options in {
                "α = 0.1": ["--federation.partition.alpha=0.1"],
                "α = 1": ["--federation.partition.alpha=1"],
                "α = ∞": ["--federation.partition.by=iid", "--federation.partition.alpha=1"],
            }.items()
        },
        (0, 1, 2),
        [
            "--tasks.*.train.limit=500", "--tasks.*.test.limit=120", "--training.batch_size=4",
            "--training.learning_rate=4e-3", "--federation.evaluate_every=0", "--prompt.cutoff=32",
        ],
    ),
    "fed-flan8": Table(
        "benchmarks/fed_flan8_small.yaml",
        {
            "equal ranks": Group(
                {
                    name: rule(name)
                    for name in (
                        "local", "fedit", "ffa-lora", "fedsa-lora", "fed-alora", "flora", "flexlora",
                    )
                },
                baseline="fedit",
            ),
            "ranks 64, 64, 32, 32, 16, 16, 8, 8": Group(
                {name: rule(name) for name in ("local", "zero-padding", "flora", "flexlora", "fed-alora-het")},
                baseline="zero-padding",
                options=["--federation.ranks=[64, 64, 32, 32, 16, 16, 8, 8]"],
            ),
        },
        (0,),
        ["--tasks.*.train.limit=32", "--tasks.*.test.limit=5", "--training.batch_size=4"],
        scored=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Federation:
    """One federation of a table."""

    recipe: str
    row: str
    seed: int
    options: list[str]

    @property
    def directory(self) -> FederatedDirectory:
        return FederatedDirectory(Path(self.options[-1].removeprefix("--output=")))

    def run(self) -> None:
        """Train it, unless it already exists with the same recipe.

        Raises:
            SystemExit: the command failed, after printing why.
        """
        finished = self.directory.state() == "finished"
        if finished and load_config(str(self.directory.config), [], FederatedConfig) == load_config(
            self.recipe, self.options, FederatedConfig
        ):
            return
        start = time.monotonic()
        words = ["federate", self.recipe, *self.options, "--resume=auto", "--json"]
        done = subprocess.run([sys.executable, "-m", "braidlora", *words], stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"braidlora {' '.join(words)}: exit code {done.returncode}")
        print(f"{self.row}, seed {self.seed}: {time.monotonic() - start:.0f} s", flush=True)

    def metrics(self) -> dict[str, Any]:
        return read_json(self.directory.metrics)

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


def federations(name: str, table: Table, seeds: Sequence[int]) -> dict[str, dict[str, list[Federation]]]:
    """All federations of a table by group and row, a list over the seeds."""
    found: dict[str, dict[str, list[Federation]]] = {}
    for title, group in table.groups.items():
        found[title] = {}
        for row, own in group.rows.items():
            stem = "-".join([title, row] if title else [row]).translate(_PLAIN)
            found[title][row] = [
                Federation(
                    table.recipe, row, seed,
                    [*table.options, *group.options, *own, f"--seed={seed}", f"--output=runs/{name}/{stem}-seed{seed}"],
                )
                for seed in seeds
            ]  # fmt: skip
    return found


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
    args = parser.parse_args()
    table = TABLES[args.table]
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else list(table.seeds)
    found = federations(args.table, table, seeds)
    in_order = [rows[row][at] for at in range(len(seeds)) for rows in found.values() for row in rows]
    with ThreadPoolExecutor(args.workers) as pool:
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
                row: {"options": table.groups[title].rows[row], **entry(runs, rows.get("local"))}
                | {"difference": differ[row]["overall"] if row in differ else None}
                for row, runs in rows.items()
            },
        }
    result = {
        "kind": "federations",
        "command": " ".join(["python benchmarks/rules_side_by_side.py", *sys.argv[1:]]),
        "environment": environment(),
        "recipe": table.recipe,
        "options": table.options,
        "seeds": seeds,
        "at_a_time": args.workers,
        "scored": table.scored,
        "groups": groups,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.table}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
