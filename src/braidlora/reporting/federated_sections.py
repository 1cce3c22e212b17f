"""The sections of a federation's report, and the files that they are made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braidlora.reporting.federated_plots import federated_plots
from braidlora.reporting.sections import Headline, Section, origin_section
from braidlora.reporting.tables import Cell, Row, Table, number, plural
from braidlora.runs import METRICS, RECIPE, failing_lines, parse_jsonl, read_covered, read_covered_json

_SKIPPED = 10  # rounds that are named one by one


def read_federation(directory: Path, command: str) -> dict[str, Any]:
    """What a report shows of a finished federation.

    Args:
        directory: where `braidlora federate` wrote.
        command: how to run it again.

    Returns:
        `{"name", "command", "recipe", "environment", "metrics", "rounds", "partition"}`; `recipe` is the text of
        `config.yaml`, `rounds` the lines of `rounds.jsonl`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return {
        "name": directory.resolve().name,
        "command": command,
        "recipe": read_covered(directory, RECIPE).decode("utf-8"),
        "environment": read_covered_json(directory, "environment.json"),
        "metrics": read_covered_json(directory, METRICS),
        "rounds": parse_jsonl(directory / "rounds.jsonl", read_covered(directory, "rounds.jsonl")),
        "partition": read_covered_json(directory, "partition.json"),
    }


def federated_headline(federated: Mapping[str, Any]) -> Headline:
    """The aggregated models' scores first, then what averaging changed, the balance, and what it rests on."""
    metrics = federated["metrics"]
    facts = [
        f"rule {metrics['rule']}",
        plural(len(metrics["clients"]), "client"),
        plural(metrics["rounds"], "round"),
        f"{megabytes(metrics['bytes']['up'])} MB up, {megabytes(metrics['bytes']['down'])} MB down",
        f"{number(metrics['seconds'], 0)} s",
    ]
    return Headline("Federation", federated["name"], _verdict(federated), facts)


def federated_sections(federated: Mapping[str, Any]) -> list[Section]:
    """Clients and rounds.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    skipped = federated["metrics"]["skipped"]
    text = []
    if skipped:
        more = f" and {len(skipped) - _SKIPPED} more" if len(skipped) > _SKIPPED else ""
        text.append(
            "Too few clients, so nothing was shared, in "
            f"{'round' if len(skipped) == 1 else 'rounds'} {', '.join(map(str, skipped[:_SKIPPED]))}{more}."
        )
    text += [*_membership(federated), *failing_lines(federated["metrics"])]
    failures = _failure_table(federated["rounds"])
    plots = {plot.name: plot for plot in federated_plots(federated)}
    partition = plots.pop("partition")
    return [
        Section("clients", "Clients", tables=[_client_table(federated["metrics"])], plots=[partition]),
        Section(
            "rounds", "Rounds", text=text, tables=[failures] if failures else [], plots=list(plots.values())
        ),
    ]


def _membership(federated: Mapping[str, Any]) -> list[str]:
    """Who came and went, what was set otherwise on the way, and of whom the rounds before the last have scores."""
    said = []
    for line in federated["rounds"]:
        changes = line.get("changes", {})
        words = [f"{', '.join(changes[key])} {key}" for key in ("joined", "left") if key in changes]
        words += [
            f"{key} is {one['now']}, {one['then']} before" for key, one in changes.get("settings", {}).items()
        ]
        if words:
            said.append(f"From round {line['round']} on: {'; '.join(words)}.")
        if any(key.startswith(("evaluation.", "tasks.")) for key in changes.get("settings", {})):
            said[-1] += " Scores of earlier rounds were made in another way, and do not compare with these."
    sample = federated["rounds"][-1].get("sample")
    if sample is not None:
        said.append(
            f"Scored in rounds before the last one: {plural(len(sample), 'client')} of "
            f"{len(federated['metrics']['clients'])}, the same in all; means and figures by round are of these. The "
            "final scores are of all clients."
        )
    departed = federated["metrics"].get("departed", {})
    if departed:
        left = ", ".join(f"{name} (after round {one['left_after']})" for name, one in departed.items())
        said.append(f"Left before the end, and not among the scores: {left}.")
    return said


def federated_origin(federated: Mapping[str, Any]) -> Section:
    """Command, recipe and environment."""
    return origin_section(federated["command"], federated["recipe"], federated["environment"])


def megabytes(count: int) -> str:
    return number(count / 1e6, 2 if count < 1e7 else 0)


def _before_and_after_averaging(rounds: list[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Scores after local training and of the aggregated model, of every client that has both in the last such round."""
    for line in reversed(rounds):
        pairs = [(one.get("after"), one.get("aggregated")) for one in line["clients"].values()]
        if known := [(after, mean) for after, mean in pairs if after is not None and mean is not None]:
            return known
    return []


def _verdict(federated: Mapping[str, Any]) -> list[str]:
    metrics = federated["metrics"]
    if metrics["mean"] is None:
        return ["No client has test rows, so nothing was scored."]
    sentences = [
        f"The aggregated models score {number(metrics['mean'])} on average; the worst client, "
        f"{metrics['worst_client']}, has {number(metrics['worst'])}."
    ]
    if pairs := _before_and_after_averaging(federated["rounds"]):
        change = statistics.fmean(aggregated - after for after, aggregated in pairs)
        sentences.append(
            f"In the last scored round, averaging changed the score of the {plural(len(pairs), 'client')} that trained "
            f"by {number(change, sign=True)} on average."
        )
    if metrics["delta_m"] is not None:
        against = "behind" if metrics["delta_m"] > 0 else "not behind"
        sentences.append(
            f"Δm% is {number(metrics['delta_m'], 2, sign=True)} against clients that train alone (lower is better): on "
            f"average {against} them."
        )
    else:
        sentences.append(f"Δm% is not given: {metrics['delta_m_reason']}.")
    if "common" in metrics:
        sentences.append(
            f"On the common test the aggregated models score {number(metrics['common']['aggregated'])}."
        )
        if left_out := metrics["common"].get("left_out"):
            sentences.append(
                f"{plural(len(left_out), 'client')} could not be scored on all of it: a head that stays with its "
                "client is trained for the client's own tasks alone."
            )
    return sentences


def _client_table(metrics: Mapping[str, Any]) -> Table:
    rows = [
        Row(
            name,
            [
                Cell(number(one["rank"], 0)),
                Cell(number(one["rows"], 0)),
                Cell(number(one["rounds"], 0)),
                Cell(number(one["before"])),
                Cell(number(one["after"])),
                Cell(number(one["aggregated"])),
                Cell(megabytes(one["bytes"]["up"])),
                Cell(megabytes(one["bytes"]["down"])),
            ],
        )
        for name, one in metrics["clients"].items()
    ]
    means = [metrics["before"]["mean"], metrics["after"]["mean"], metrics["mean"]]
    spreads = [metrics["before"]["std"], metrics["after"]["std"], metrics["std"]]
    for title, values in (("Mean", means), ("Standard deviation over clients", spreads)):
        cells = [*[Cell("")] * 3, *(Cell(number(value)) for value in values), *[Cell("")] * 2]
        rows.append(Row(title, cells, apart=True))
    columns = [
        "Client", "Rank", "Training rows", "Rounds trained", "Before training", "After training", "Aggregated",
        "MB up", "MB down",
    ]  # fmt: skip
    notes = [
        "Scores are of the last round in which a client was scored, on its own test rows, from 0 to 100."
    ]
    return Table("clients-table", "Every client", columns, rows, notes)


def _failure_table(rounds: list[Mapping[str, Any]]) -> Table | None:
    rows = [
        Row(
            f"Round {line['round']}",
            [
                Cell(name),
                Cell("left out" if failed["left_out"] else "answered in the end"),
                Cell("\n".join(failed["why"])),
            ],
        )
        for line in rounds
        for name, failed in line.get("failed", {}).items()
    ]
    if not rows:
        return None
    columns = ["Round", "Client", "What became of it", "Why"]
    return Table("failures", "Clients that failed", columns, rows, text_columns=range(4))
