"""The suites of docs/leaderboard.md, read from the JSON under benchmarks/results, and ranks with intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.adapters.sharing import by_method
from braidlora.comparison.statistics import t_quantile

CONFIDENCE = 0.95
METHODS = ("lora", "lora-matched", *(method for method in by_method() if method != "lora"))
MIXED = ", mixed ranks"


@dataclass(frozen=True)
class Entry:
    """One method or rule in one suite.

    Attributes:
        values: mean score by seed.
        cost: named numbers; tables show them relative to the baseline's.
        row: its JSON.
    """

    values: Sequence[float]
    cost: Mapping[str, float]
    row: Mapping[str, Any]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class Suite:
    """A table under benchmarks/results, or one group of its rows.

    Attributes:
        title: in the columns.
        name: of the file.
        baseline: the row that the others' `difference` is from.
        entries: by method or rule.
        pairs: further differences of a federated table.
        tuned: whether the learning rate was tuned for every row.
        about: seeds, tasks or clients, command and date.
    """

    title: str
    name: str
    baseline: str
    entries: Mapping[str, Entry]
    pairs: Sequence[Mapping[str, Any]]
    tuned: bool
    about: str


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every results file by its name; of an evidence file, the comparison with its tuning."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("kind") == "evidence":
            content = {**content["comparison"], "was_tuned": True}
        found[path.stem] = content
    return found


def comparisons(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Suite]:
    """Every comparison of built-in methods, by the name of its file."""
    found = {}
    for name, result in results.items():
        if "verdict" not in result or "rows" not in result:
            continue
        rows = {row["name"]: row for row in result["rows"] if row["name"] in METHODS}
        entries = {
            method: Entry(
                row["mean"]["values"],
                {"parameters": row["trainable_parameters"], "seconds": row["seconds"]["mean"]},
                row,
            )
            for method, row in rows.items()
        }
        if len(entries) > 1:
            tuned = bool(result.get("was_tuned")) or all(row["tuned"] for row in rows.values())
            found[name] = Suite(
                result["recipe"]["name"], name, result["baseline"], entries, [], tuned,
                _about(result, f"{len(result['tasks'])} tasks"),
            )  # fmt: skip
    return found


def of_recipe(suites: Mapping[str, Suite], recipe: str) -> Suite | None:
    """The comparison of a recipe with the most methods, and of those with the most seeds."""
    own = [suite for suite in suites.values() if suite.title == recipe]
    return max(
        own,
        key=lambda suite: (len(suite.entries), len(next(iter(suite.entries.values())).values)),
        default=None,
    )


def federations(results: Mapping[str, Mapping[str, Any]], mixed: bool) -> list[Suite]:
    """Every scored group of federations that has two rules or more, with equal ranks or with mixed ones.

    Only rows that are a rule as it is, on the group's clients, count: not those with an independent start, say.
    """
    found = []
    for name, result in results.items():
        if result.get("kind") != "federations" or not result["scored"]:
            continue
        for title, group in result["groups"].items():
            entries = {
                row["rule"]: Entry(
                    row["mean"]["values"],
                    {
                        "bytes": sum(row["bytes_per_client_and_round"].values()),
                        "seconds": row["seconds"]["mean"],
                    },
                    row,
                )
                for label, row in group["rows"].items()
                if label.removesuffix(MIXED) == row["rule"] and (len(set(row["ranks"])) > 1) == mixed
            }
            if len(entries) > 1:
                clients = len(next(iter(entries.values())).row["ranks"])
                full = Path(result["recipe"]).stem + (f", {title}" if title else "")
                about = _about(result, f"{clients} clients")
                tuned = all(entry.row.get("tuning") for entry in entries.values())
                found.append(Suite(full, name, group["baseline"], entries, group["pairs"], tuned, about))
    return found


def _about(result: Mapping[str, Any], size: str) -> str:
    here = result["environment"]
    return (
        f"{size}, {len(result['seeds'])} seeds, {here['date'][:10]}, {here['machine']['processor']}: "
        f"`{result['command']}`"
    )


# ---- ranks


@dataclass(frozen=True)
class Rank:
    """1 is the highest mean; the seeds do not rule out low to high, of so many rows."""

    rank: int
    low: int
    high: int
    of: int


def ranks(values: Mapping[str, Sequence[float]]) -> dict[str, Rank]:
    """The rank of every row by its mean, and the ranks that its seeds do not rule out.

    Row a is behind b if the paired interval of b − a over seeds is above 0. A row's interval begins after those that
    it is behind, and ends before those that are behind it. Its k − 1 comparisons share the 5% (Bonferroni), so the
    interval contains the row's rank with 95%.
    """
    count = len(values)
    means = {name: statistics.fmean(of) for name, of in values.items()}
    confidence = 1 - (1 - CONFIDENCE) / max(1, count - 1)
    found = {}
    for name, own in values.items():
        gaps = [paired(other, own, confidence) for key, other in values.items() if key != name]
        ahead = sum(gap is not None and gap[1] > 0 for gap in gaps)
        behind = sum(gap is not None and gap[2] < 0 for gap in gaps)
        rank = 1 + sum(mean > means[name] for mean in means.values())
        found[name] = Rank(rank, 1 + ahead, count - behind, count)
    return found


def paired(
    values: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float] | None:
    """Mean and interval of values − other, paired by seed; None if there are fewer than two, or they do not pair."""
    if len(values) != len(other) or len(values) < 2:
        return None
    gaps = [a - b for a, b in zip(values, other, strict=True)]
    mean = statistics.fmean(gaps)
    reach = t_quantile(confidence, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return mean, mean - reach, mean + reach


def place(found: Sequence[Rank]) -> float:
    """The mean place over suites: 0 is always first, 1 always last."""
    return statistics.fmean((one.rank - 1) / (one.of - 1) for one in found)


# ---- text


def table(
    suites: Sequence[Suite], labels: Mapping[str, str], head: str, costs: Mapping[str, str], reference: str
) -> str:
    """Rank with interval in every suite, cost relative to `reference`, mean place; the best place first."""
    by_suite = [ranks({name: entry.values for name, entry in suite.entries.items()}) for suite in suites]
    present = {name: [found[name] for found in by_suite if name in found] for name in labels}
    order = sorted((name for name in labels if present[name]), key=lambda name: place(present[name]))
    rows = []
    for name in order:
        cells = []
        for found in by_suite:
            one = found.get(name)
            cells.append("–" if one is None else f"{one.rank} ({one.low}–{one.high}) of {one.of}")
        relative = [_relative(suites, name, key, reference) for key in costs]
        rows.append([labels[name], *relative, *cells, f"{place(present[name]):.2f}", str(len(present[name]))])
    header = [head, *costs.values(), *(suite.title for suite in suites), "place", "suites"]
    return markdown(header, rows)


def _relative(suites: Sequence[Suite], name: str, key: str, reference: str) -> str:
    ratios = [
        suite.entries[name].cost[key] / suite.entries[reference].cost[key]
        for suite in suites
        if name in suite.entries and reference in suite.entries and suite.entries[reference].cost[key]
    ]
    return f"{statistics.fmean(ratios):.1f} ×" if ratios else "–"


def differences(suites: Sequence[Suite], labels: Mapping[str, str], head: str) -> str:
    """Points above the suite's baseline, with their 95% CIs, as the tables themselves give them."""
    rows = []
    for name, label in labels.items():
        cells = [_difference(suite, name) for suite in suites]
        if set(cells) != {"–"}:
            rows.append([label, *cells])
    return markdown([head, *(suite.title for suite in suites)], rows)


def _difference(suite: Suite, name: str) -> str:
    if name not in suite.entries:
        return "–"
    if name == suite.baseline:
        return f"{suite.entries[name].mean:.1f}"
    found = suite.entries[name].row["difference"]
    return "–" if found is None else interval(found["mean"], found["low"], found["high"])


def interval(mean: float, low: float | None, high: float | None) -> str:
    """`+1.0 [−0.5, +2.5]`."""
    text = f"{mean:+.1f}" if low is None or high is None else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return text.replace("-", "−")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
