"""The sections of a federation's report, and the files they are made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braidlora.reporting.federated_plots import federated_plots
from braidlora.reporting.sections import Headline, Section
from braidlora.runs import (
    METRICS,
    RECIPE,
    failing_lines,
    listed_rounds,
    parse_jsonl,
    privacy_lines,
    read_covered,
    read_covered_json,
)
from braidlora.tables import Table, TableRow, epsilon_text, number, plural


def read_federation(directory: Path, command: str) -> dict[str, Any]:
    """What a report shows of a finished federation.

    Args:
        directory: the output of `braidlora federate`.
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
    """Scores of the aggregated models, what averaging changed, the balance, and what these are based on."""
    metrics = federated["metrics"]
    facts = [
        f"rule {metrics['rule']}",
        plural(len(metrics["clients"]), "client"),
        plural(metrics["rounds"], "round"),
        f"{_megabytes(metrics['bytes']['up'])} MB uploaded, {_megabytes(metrics['bytes']['down'])} MB downloaded",
        f"{number(metrics['seconds'], 0)} s",
    ]
    return Headline("Federation", federated["name"], _verdict(federated), facts)


def federated_sections(federated: Mapping[str, Any]) -> list[Section]:
    """Clients and rounds.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    skipped = federated["metrics"]["skipped"]
    text = (
        [f"Rounds with too few clients, in which nothing was aggregated: {listed_rounds(skipped)}."]
        if skipped
        else []
    )
    text += [*_membership(federated), *failing_lines(federated["metrics"])]
    failures = _failure_table(federated["rounds"])
    *plots, partition = federated_plots(federated)
    private = [_privacy_section(federated)] if "privacy" in federated["metrics"] else []
    return [
        Section(
            "clients",
            "Clients",
            tables=[_client_table(federated["metrics"], federated["partition"])],
            plots=[partition],
        ),
        Section("rounds", "Rounds", text=text, tables=[failures] if failures else [], plots=plots),
        *private,
    ]


def _privacy_section(federated: Mapping[str, Any]) -> Section:
    """ε after every round, and what it covers."""
    found = federated["metrics"]["privacy"]
    text = [
        *(f"{line[9].upper()}{line[10:]}." for line in privacy_lines(federated["metrics"])),  # after "privacy: "
        "This covers what clients receive: the shared tensors, whoever sees them and for however long. It does not "
        "cover this page, rounds.jsonl and metrics.json, which have losses and scores of single clients and say who "
        "took part, nor the factors that a client keeps for itself.",
    ]  # fmt: skip
    at_clients = found["noise"] == "clients"
    columns = ["Round", "Releases so far", "ε"] + (
        ["ε toward the server"] if at_clients else ["Changes clipped"]
    )
    rows = []
    for line in federated["rounds"]:
        one = line.get("privacy")
        if one is None:
            continue
        count = sum("loss" in client for client in line["clients"].values())
        last = _epsilon(one, "epsilon_server") if at_clients else f"{one['clipped']} of {count}"
        rows.append(TableRow(str(line["round"]), [str(one["releases"]), _epsilon(one, "epsilon"), last]))
    notes = [
        f"δ = {found['delta']:g}; two datasets are neighbors if they differ in this: {found['neighbors']}."
    ]
    return Section(
        "privacy", "Privacy", text=text, tables=[Table("epsilon", "ε by round", columns, rows, notes)]
    )


def _epsilon(privacy: Mapping[str, Any], key: str) -> str:
    return epsilon_text(privacy[key]) if privacy["guarantee"] else "no guarantee"


def _membership(federated: Mapping[str, Any]) -> list[str]:
    """Clients that joined or left, settings that changed, and which clients were scored before the last round."""
    sentences = []
    for line in federated["rounds"]:
        changes = line.get("changes", {})
        settings = changes.get("settings", {})
        words = [f"{', '.join(changes[key])} {key}" for key in ("joined", "left") if key in changes]
        words += [f"{key} is {one['now']} (before: {one['then']})" for key, one in settings.items()]
        if words:
            sentences.append(f"From round {line['round']} on: {'; '.join(words)}.")
        if any(key.startswith(("evaluation.", "tasks.")) for key in settings):
            sentences[-1] += (
                " Earlier rounds were scored differently; their scores are not comparable with later ones."
            )
    sample = federated["rounds"][-1].get("sample")
    if sample is not None:
        sentences.append(
            f"Rounds before the last one scored the same {len(sample)} of "
            f"{plural(len(federated['metrics']['clients']), 'client')}; means and figures by round cover only these. "
            "The final scores cover all clients."
        )
    departed = federated["metrics"].get("departed", {})
    if departed:
        left = ", ".join(f"{name} (after round {one['left_after']})" for name, one in departed.items())
        sentences.append(f"Removed before the end and not scored: {left}.")
    return sentences


def _megabytes(count: int) -> str:
    return number(count / 1e6, 2 if count < 1e7 else 0)


def _before_and_after_averaging(rounds: list[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Scores after local training and of the aggregated model, of every client with both in the last such round."""
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
        f"{metrics['worst_client']}, scores {number(metrics['worst'])}."
    ]
    if pairs := _before_and_after_averaging(federated["rounds"]):
        change = statistics.fmean(aggregated - after for after, aggregated in pairs)
        sentences.append(
            f"In the last scored round, aggregation changed the scores of the {plural(len(pairs), 'client')} that "
            f"trained by {number(change, sign=True)} on average."
        )
    if metrics["delta_m"] is not None:
        against = "worse" if metrics["delta_m"] > 0 else "not worse"
        sentences.append(
            f"Δm% relative to clients that train alone is {number(metrics['delta_m'], 2, sign=True)} (lower is "
            f"better): on average {against}."
        )
    else:
        sentences.append(f"Δm% is not available: {metrics['delta_m_reason']}.")
    if "common" in metrics:
        score = number(metrics["common"]["aggregated"])
        sentences.append(f"On the common test the aggregated models score {score}.")
        if left_out := metrics["common"].get("left_out"):
            sentences.append(
                f"{plural(len(left_out), 'client')} could not be scored on all of it: a head that stays on its "
                "client is trained only for the client's own tasks."
            )
    return sentences


def _client_table(metrics: Mapping[str, Any], partition: Mapping[str, Any]) -> Table:
    rows = [
        TableRow(
            name,
            [
                *(number(one[key], 0) for key in ("rank", "rows", "rounds")),
                *(number(one[key]) for key in ("before", "after", "aggregated")),
                *(_megabytes(one["bytes"][way]) for way in ("up", "down")),
            ],
        )
        for name, one in metrics["clients"].items()
    ]
    stages = (metrics["before"], metrics["after"], metrics)
    for title, key in (("Mean", "mean"), ("Standard deviation over clients", "std")):
        cells = ["", "", "", *(number(stage[key]) for stage in stages), "", ""]
        rows.append(TableRow(title, cells, apart=True))
    columns = [
        "Client", "Rank", "Training rows", "Rounds trained", "Before training", "After training", "Aggregated",
        "MB uploaded", "MB downloaded",
    ]  # fmt: skip
    notes = ["Scores of the last round in which a client was scored, on its own test rows, from 0 to 100."]
    return Table("clients-table", "All clients", columns, rows, [*notes, *_forms_of_the_base(partition)])


def _forms_of_the_base(partition: Mapping[str, Any]) -> list[str]:
    """Which clients have the base model in which dtype and quantization, where sites differ."""
    clients: dict[str, list[str]] = {}
    for name, one in partition.items():
        if base := one.get("base"):
            form = base["dtype"] + ("" if base["quantization"] == "none" else f" in {base['quantization']}")
            clients.setdefault(form, []).append(name)
    if len(clients) < 2:
        return []
    return [
        "Base model by client: " + "; ".join(f"{form}: {', '.join(of)}" for form, of in clients.items()) + "."
    ]


def _failure_table(rounds: list[Mapping[str, Any]]) -> Table | None:
    rows = [
        TableRow(
            f"Round {line['round']}",
            [name, "left out" if failed["left_out"] else "succeeded on retry", "\n".join(failed["why"])],
        )
        for line in rounds
        for name, failed in line.get("failed", {}).items()
    ]
    if not rows:
        return None
    columns = ["Round", "Client", "Outcome", "Reason"]
    return Table("failures", "Clients that failed", columns, rows, text_columns=range(4))
