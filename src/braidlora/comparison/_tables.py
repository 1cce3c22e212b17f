"""A comparison as tables: plain text for the terminal, Markdown for a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from braidlora.comparison._verdict import headline
from braidlora.tables import interval, markdown_table, number, spread, text_table

_WIDEST = 9  # columns; a wider table of scores is transposed
_rounded = partial(number, digits=0)
_Titled = tuple[str, list[str], list[list[str]]]
"""Title, header and rows."""


def as_text(comparison: Mapping[str, Any]) -> str:
    """Tables, what their columns mean, details, and last, where a terminal shows it, the verdict with its findings."""
    parts = [f"{title}\n\n{text_table(header, rows)}" for title, header, rows in _tables(comparison)]
    parts.append("\n".join(_notes(comparison)))
    parts.append("\n".join(f"- {sentence}" for sentence in comparison["details"]))
    if findings := comparison["advice"]["findings"]:
        parts.append("\n".join(["Findings", *(f"! {sentence}" for sentence in findings)]))
    parts.append("\n".join(["Verdict", *headline(comparison["advice"])]))
    return "\n\n".join(parts)


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """`comparison.md`: verdict, tables, what the columns mean, machine, and the command to run it again."""
    lines = [f"# {comparison['recipe']['name']}: {len(comparison['rows'])} rows compared", ""]
    lines += [
        f"**{comparison['advice']['what']}**  ",
        *(f"{line}  " for line in headline(comparison["advice"])[1:]),
    ]
    if findings := comparison["advice"]["findings"]:
        lines += ["", *(f"- {sentence}" for sentence in findings)]
    for title, header, rows in _tables(comparison):
        lines += ["", f"## {title}", "", markdown_table(header, rows)]
    lines += ["", *(f"{note}  " for note in _notes(comparison))]
    lines += ["", "## In detail", "", *(f"- {sentence}" for sentence in comparison["details"])]
    if comparison["command"]:
        lines += ["", f"    {comparison['command']}"]
    made = comparison["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    lines += ["", f"{made['machine']['processor']}, {made['date']}; {versions}."]
    return "\n".join(lines) + "\n"


def _tables(comparison: Mapping[str, Any]) -> Iterator[_Titled]:
    yield _overview(comparison)
    yield _by_task(comparison)
    if any(row["tuning"] for row in comparison["rows"]):
        yield _tuning(comparison)


def _overview(comparison: Mapping[str, Any]) -> _Titled:
    tuned = list(dict.fromkeys(key for row in comparison["rows"] for key in row["tuned"] or {}))
    against = f"vs. {comparison['baseline']}"
    # With one task, the worst task has the mean, and LoRA is the single-task LoRA.
    several = len(comparison["tasks"]) > 1
    balance = several or any(row["delta_m"] is not None for row in comparison["rows"])
    header = ["", "parameters", "mean", *["worst task"] * several, *["Δm%"] * balance, against, *tuned]
    header += ["seconds", "MiB"]
    rows = [
        [
            row["label"],
            _rounded(row["trainable_parameters"]),
            spread(row["mean"]),
            *[f"{spread(row['worst'])} ({', '.join(dict.fromkeys(row['worst']['tasks']))})"] * several,
            *[spread(row["delta_m"], sign=True)] * balance,
            interval(row["difference"]),
            *(str((row["tuned"] or {}).get(key, "–")) for key in tuned),
            _rounded(row["seconds"]["mean"]),
            _rounded(row["peak_memory_mib"]["mean"]),
        ]
        for row in comparison["rows"]
    ]
    return comparison["recipe"]["name"], header, rows


def _by_task(comparison: Mapping[str, Any]) -> _Titled:
    tasks, references = comparison["tasks"], comparison["references"]["scores"] or {}
    columns: list[list[str]] = [["", *tasks, "mean"]]
    columns.append(["metric", *(task["metric"] for task in tasks.values()), ""])
    columns.append(["rows", *(str(task["n"]) for task in tasks.values()), ""])
    for title in ("base", "majority"):
        if (known := comparison[title]) is not None:
            columns.append(
                [title, *(number(known["tasks"].get(task)) for task in tasks), number(known["mean"])]
            )
    if references:
        columns.append(["single-task", *(spread(references.get(task)) for task in tasks), ""])
    for row in comparison["rows"]:
        columns.append([row["label"], *(spread(row["tasks"][task]) for task in tasks), spread(row["mean"])])
    lines = [list(line) for line in zip(*columns, strict=True)]
    if len(columns) > max(_WIDEST, len(lines)):
        lines = columns
    return "Scores by task", lines[0], lines[1:]


def _tuning(comparison: Mapping[str, Any]) -> _Titled:
    # A row without experts is not tried with other values of a key about experts.
    compared = [row for row in comparison["rows"] if row["tuning"]]
    grid = [_values(entry["values"]) for row in compared for entry in row["tuning"]]
    rows = [[values] for values in dict.fromkeys(grid)]
    for row in compared:
        tried = {_values(entry["values"]): entry for entry in row["tuning"]}
        for cells in rows:
            entry = tried.get(cells[0])
            if entry is None:
                cells.append("–")
                continue
            loss = entry["validation_loss"]
            text = "failed" if loss is None else spread(loss, 3)
            cells.append(text + (" *" if entry["values"] == row["tuned"] else ""))
    header = ["", *(row["label"] for row in compared)]
    return "Validation loss of the values tried; * marks the chosen ones", header, rows


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values.items())


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, comparison["seeds"]))
    notes = [
        f"Scores run from 0 to 100. ± is the sample standard deviation over seeds ({seeds}).",
        f"vs. {comparison['baseline']}: mean paired difference and its {comparison['confidence']:.0%} CI.",
        f"Seconds: training and evaluation of one run. MiB: peak of {comparison['memory']}.",
    ]
    if comparison["references"]["scores"]:
        notes.append(
            "Δm%: average loss relative to single-task LoRAs, in percent of their scores; lower is better."
        )
    if (sweep := comparison["sweep"]) is not None:
        notes.append(f"Swept: {sweep['key']}; matched: {sweep['matched']}.")
    return notes
