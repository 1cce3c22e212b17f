"""A comparison as tables: plain text for the terminal, Markdown for a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from braidlora.comparison._verdict import score, signed
from braidlora.evaluation.table import format_table

_WIDEST = 9  # columns; a wider table of scores is turned round


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]


def as_text(comparison: Mapping[str, Any]) -> str:
    """Tables, verdict and what the columns mean, for the terminal."""
    parts = [f"{table.title}\n\n{_aligned(table)}" for table in _tables(comparison)]
    parts.append("\n".join(f"- {sentence}" for sentence in comparison["verdict"]))
    parts.append("\n".join(_notes(comparison)))
    return "\n\n".join(parts)


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """`comparison.md`: verdict, tables, what the columns mean, machine, and the command that makes it again."""
    lines = [f"# {comparison['recipe']['name']}: {len(comparison['rows'])} rows compared", ""]
    lines += [f"- {sentence}" for sentence in comparison["verdict"]]
    for table in _tables(comparison):
        lines += ["", f"## {table.title}", "", *_markdown(table)]
    lines += ["", *(f"{note}  " for note in _notes(comparison))]
    if comparison["command"]:
        lines += ["", f"    {comparison['command']}"]
    made = comparison["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    lines += ["", f"{made['machine']['processor']}, {made['date']}; {versions}."]
    return "\n".join(lines) + "\n"


def _tables(comparison: Mapping[str, Any]) -> Iterator[Table]:
    yield _overview(comparison)
    yield _by_task(comparison)
    if comparison["rows"][0]["tuning"]:
        yield _tuning(comparison)


def _overview(comparison: Mapping[str, Any]) -> Table:
    rows = comparison["rows"]
    tuned = list(rows[0]["tuned"] or {})
    header = ["", "parameters", "mean", "worst task", "Δm%", f"against {comparison['baseline']}", *tuned]
    lines = []
    for row in rows:
        worst = ", ".join(dict.fromkeys(row["worst"]["tasks"]))
        lines.append(
            [
                row["label"],
                f"{row['trainable_parameters']:,}",
                score(row["mean"]),
                f"{score(row['worst'])} ({worst})",
                "–" if row["delta_m"] is None else signed(row["delta_m"]),
                "–" if row["difference"] is None else _difference(row["difference"]),
                *(str(row["tuned"][key]) for key in tuned),
                _whole(row["seconds"]["mean"]),
                _whole(row["peak_memory_mib"]["mean"]),
            ]
        )
    return Table(comparison["recipe"]["name"], [*header, "seconds", "MiB"], lines)


def _by_task(comparison: Mapping[str, Any]) -> Table:
    tasks, references = comparison["tasks"], comparison["references"]["scores"] or {}
    columns: list[list[str]] = [["", *tasks, "mean"]]
    columns.append(["metric", *(task["metric"] for task in tasks.values()), ""])
    columns.append(["rows", *(str(task["n"]) for task in tasks.values()), ""])
    for title in ("base", "majority"):
        if (known := comparison[title]) is not None:
            columns.append(
                [title, *(_plain(known["tasks"].get(task)) for task in tasks), _plain(known["mean"])]
            )
    if references:
        alone = [score(references[task]) if task in references else "–" for task in tasks]
        columns.append(["single-task", *alone, ""])
    for row in comparison["rows"]:
        columns.append([row["label"], *(score(row["tasks"][task]) for task in tasks), score(row["mean"])])
    lines = [list(line) for line in zip(*columns, strict=True)]
    if len(columns) > max(_WIDEST, len(lines)):
        lines = columns
    return Table("Scores by task", lines[0], lines[1:])


def _tuning(comparison: Mapping[str, Any]) -> Table:
    rows = comparison["rows"]
    lines = [[_values(entry["values"])] for entry in rows[0]["tuning"]]
    for row in rows:
        for line, entry in zip(lines, row["tuning"], strict=True):
            chosen = " *" if entry["values"] == row["tuned"] else "  "
            line.append(_loss(entry["validation_loss"]) + chosen)
    return Table("Validation loss of the values tried; * is the one taken", ["", *_labels(rows)], lines)


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, comparison["seeds"]))
    notes = [
        f"Scores run from 0 to 100. ± is the sample standard deviation over seeds ({seeds}).",
        f"Against {comparison['baseline']}: mean paired difference and its {comparison['confidence']:.0%} interval.",
        f"Seconds: training and evaluation of one run. MiB: peak of {comparison['memory']}.",
    ]
    if comparison["references"]["scores"]:
        notes.append(
            "Δm%: mean loss against single-task LoRAs, in per cent of their scores; lower is better."
        )
    if (sweep := comparison["sweep"]) is not None:
        notes.append(f"Swept: {sweep['key']}; matched: {sweep['matched']}.")
    return notes


def _labels(rows: list[Mapping[str, Any]]) -> list[str]:
    return [row["label"] for row in rows]


def _difference(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]"


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values.items())


def _loss(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "failed"
    spread = "" if value["std_seeds"] is None else f" ± {value['std_seeds']:.3f}"
    return f"{value['mean']:.3f}{spread}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _aligned(table: Table) -> str:
    """All columns but the first flush right, which `format_table` does by itself for numbers only."""
    columns = list(zip(table.header, *table.lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    padded = [
        column if number == 0 else [text.rjust(width) for text in column]
        for number, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    header, *lines = zip(*padded, strict=True)
    return format_table(header, lines)


def _markdown(table: Table) -> list[str]:
    lines = ["| " + " | ".join(table.header) + " |", "|---|" + "---:|" * (len(table.header) - 1)]
    return lines + [
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in table.lines
    ]
