"""The HTML tables of a comparison: over tasks, by task, what every method was given, and how it was tuned."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.reporting.significance import best, mark
from braidlora.tables import UNKNOWN, Table, TableCell, TableRow, interval, listed, number, plural, spread

REFERENCE = "Single-task LoRAs"
BASE = "Base model, untrained"
MAJORITY = "Most frequent answer"
_BASELINE = "baseline"


def baseline_label(comparison: Mapping[str, Any]) -> str:
    """The baseline's label on the page."""
    labels = {row["name"]: row["label"] for row in comparison["rows"]}
    return labels.get(comparison["baseline"], comparison["baseline"])


def percent(comparison: Mapping[str, Any]) -> str:
    """The confidence level: `95%`."""
    return f"{100 * comparison['confidence']:g}%"


def reference_scores(comparison: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Scores by task of what is not a method of the comparison: single-task LoRAs, base model, most frequent answer."""
    found: dict[str, dict[str, float | None]] = {}
    if scores := comparison["references"]["scores"]:
        found[REFERENCE] = {task: score["mean"] for task, score in scores.items()}
    for name, key in ((BASE, "base"), (MAJORITY, "majority")):
        if comparison[key] is not None:
            found[name] = dict(comparison[key]["tasks"])
    return found


def summary_table(comparison: Mapping[str, Any]) -> Table:
    """One line per method: mean, worst task, Δm%, difference from the baseline, and cost.

    Columns without any known value are left out; the notes say why.
    """
    methods = comparison["rows"]
    difference = f"Difference from {baseline_label(comparison)} [{percent(comparison)} CI]"
    more = {
        "Δm%": [spread(row["delta_m"], sign=True) for row in methods],
        difference: [
            _BASELINE if row["name"] == comparison["baseline"] else interval(row["difference"])
            for row in methods
        ],
        "Trained parameters": [number(row["trainable_parameters"], 0) for row in methods],
        "Seconds": [spread(row["seconds"]) for row in methods],
        "Peak memory, MiB": [spread(row["peak_memory_mib"], 0) for row in methods],
    }
    columns: dict[str, Sequence[str | TableCell]] = {
        "Mean score": _scores(
            comparison, [row["mean"] for row in methods], [row["difference"] for row in methods]
        ),
    }
    several = len(comparison["tasks"]) > 1  # the worst of one task has the mean
    if several:
        columns["Worst task"] = [TableCell(spread(row["worst"]), detail=_worst_tasks(row)) for row in methods]
    columns |= {
        title: texts
        for title, texts in more.items()
        if any(text not in (UNKNOWN, _BASELINE) for text in texts)
    }
    labels = [row["label"] for row in methods]
    rows = [TableRow(label, cells) for label, *cells in zip(labels, *columns.values(), strict=True)]
    for name, by_task in reference_scores(comparison).items():
        known = {task: score for task, score in by_task.items() if score is not None}
        if known:
            worst = min(known, key=known.__getitem__)
            mean = statistics.fmean(known.values()) if len(known) == len(by_task) else None
            cells: list[str | TableCell] = [number(mean)]
            if several:
                cells.append(TableCell(number(known[worst]), detail=worst))
            cells += [""] * (len(columns) - len(cells))
            rows.append(TableRow(name, cells, apart=True))
    caption = "Every method over all tasks; scores run from 0 to 100"
    return Table("summary", caption, ["Method", *columns], rows, _notes(comparison))


def task_table(comparison: Mapping[str, Any]) -> Table:
    """One line per task, one column per method."""
    methods, references = comparison["rows"], reference_scores(comparison)
    measured = {
        task: f"{about['metric']}, {plural(about['n'], 'test row')}"
        for task, about in comparison["tasks"].items()
    }
    same = len(set(measured.values())) == 1
    rows = []
    for task, about in measured.items():
        cells = _scores(
            comparison,
            [row["tasks"].get(task) for row in methods],
            [(row["difference"] or {"tasks": {}})["tasks"].get(task) for row in methods],
        )
        others = [number(scores.get(task)) for scores in references.values()]
        rows.append(TableRow(task, [*cells, *others], detail="" if same else about))
    columns = ["Task", *(row["label"] for row in methods), *references]
    compared = sum(len(row["difference"]["tasks"]) for row in methods if row["difference"] is not None)
    marked = any(isinstance(cell, TableCell) and cell.mark for row in rows for cell in row.cells)
    notes = [_marks_note(comparison)] if marked else []
    if compared and not marked:
        notes.append(f"No method is significantly different from {baseline_label(comparison)} on any task.")
    chance = compared * (1 - comparison["confidence"])
    if marked and chance >= 1:
        notes.append(
            f"Of {compared} such CIs, about {chance:.0f} would exclude 0 by chance even if no method differed: look "
            "for patterns rather than single marks."
        )
    caption = f"Score on every task ({next(iter(measured.values()))} each)" if same else "Score on every task"
    return Table("scores-by-task", caption, columns, rows, notes)


def settings_table(comparison: Mapping[str, Any]) -> Table:
    """What each method changes in the recipe, what tuning chose for it, and where its runs are."""
    rows = [
        TableRow(
            row["label"],
            [
                _assignments(row["overrides"]),
                _assignments(row["tuned"]) if row["tuned"] else UNKNOWN,
                "\n".join(row["runs"]),
            ],
        )
        for row in comparison["rows"]
    ]
    columns = ["Method", "Changes to the recipe", "Tuned", "Runs, relative to this page's folder"]
    return Table("settings", "Settings of each method", columns, rows, text_columns=range(len(columns)))


def tuning_table(comparison: Mapping[str, Any]) -> Table | None:
    """Validation loss of everything that was tried, or None if nothing was tuned."""
    rows = []
    for row in comparison["rows"]:
        for trial in row["tuning"]:
            chosen = "chosen" if trial["values"] == row["tuned"] else ""
            loss = spread(trial["validation_loss"], 4)  # unknown: a run did not finish
            rows.append(TableRow(row["label"], [_assignments(trial["values"]), loss, chosen]))
    if not rows:
        return None
    return Table(
        "tuning",
        "Values tried, and the validation loss used to select them; test rows were not used",
        ["Method", "Tried", "Validation loss", "Choice"],
        rows,
        text_columns=(0, 1, 3),
    )


def _scores(
    comparison: Mapping[str, Any],
    scores: Sequence[Mapping[str, Any] | None],
    differences: Sequence[Mapping[str, Any] | None],
) -> list[TableCell]:
    """One cell per method: its score, marked by its difference from the baseline, the best in bold."""
    names = [row["name"] for row in comparison["rows"]]
    baseline = names.index(comparison["baseline"]) if comparison["baseline"] in names else None
    marks = [mark(difference) for difference in differences]
    top = best([None if score is None else score["mean"] for score in scores], marks, baseline)
    return [
        TableCell(spread(score), mark=marks[index], best=index == top) for index, score in enumerate(scores)
    ]


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    methods = comparison["rows"]
    notes = []
    if len(comparison["seeds"]) > 1:
        notes.append("± is the standard deviation over seeds.")
    else:
        notes.append("One seed only: the variation between seeds is unknown.")
    if any(mark(row["difference"]) for row in methods):
        notes.append(_marks_note(comparison))
    if any(row["delta_m"] is not None for row in methods):
        notes.append(
            "Δm% is the average loss relative to LoRAs trained on one task each, in percent of their scores. Lower is "
            "better; a negative value means better than the single-task LoRAs."
        )
    if any(row["peak_memory_mib"]["mean"] is not None for row in methods):
        notes.append(f"Peak memory: {comparison['memory']}.")
    if any(row["delta_m"] is not None for row in methods) or not comparison["references"]["reason"]:
        notes += _reasons("Δm%", [(row["label"], row["delta_m_reason"]) for row in methods])
    elif len(comparison["tasks"]) > 1:  # with one task, the row `lora` is the single-task LoRA
        notes.append(f"Δm% is not available: {comparison['references']['reason']}.")
    for name, key in ((BASE, "base"), (MAJORITY, "majority")):
        if comparison[f"{key}_reason"]:
            notes.append(f"{name}: {comparison[f'{key}_reason']}.")
    others = [row for row in methods if row["name"] != comparison["baseline"]]
    return notes + _reasons("Difference", [(row["label"], row["difference_reason"]) for row in others])


def _reasons(what: str, reasons: Sequence[tuple[str, str | None]]) -> list[str]:
    """One note per reason, naming the methods it applies to."""
    by_reason: dict[str, list[str]] = {}
    for label, reason in reasons:
        if reason:
            by_reason.setdefault(reason, []).append(label)
    return [f"{what} unknown for {listed(labels)}: {reason}." for reason, labels in by_reason.items()]


def _marks_note(comparison: Mapping[str, Any]) -> str:
    baseline = baseline_label(comparison)
    return (
        f"▲ and ▼: significantly above or below {baseline}; the {percent(comparison)} CI of the difference excludes 0. "
        f"Bold: the highest of the methods, if significantly above {baseline}. Methods other than {baseline} are not "
        "tested against each other."
    )


def _worst_tasks(row: Mapping[str, Any]) -> str:
    tasks = (row["worst"] or {}).get("tasks") or []
    return "\n".join(dict.fromkeys(task for task in tasks if task is not None))


def _assignments(values: Mapping[str, Any]) -> str:
    """`key=value` as on the command line, one per line."""
    return "\n".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    )
