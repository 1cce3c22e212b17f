"""The tables of a comparison: over tasks, by task, what every method got, and how it was tuned."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.reporting.tables import (
    UNKNOWN,
    Cell,
    Row,
    Table,
    best,
    interval,
    listed,
    mark,
    number,
    plural,
    spread,
)

REFERENCE = "Single-task LoRAs"
BASE = "Base model, untrained"
MAJORITY = "Most frequent answer"
_BASELINE = "baseline"


def baseline_label(comparison: Mapping[str, Any]) -> str:
    """How the baseline is called on the page."""
    labels = {row["name"]: row["label"] for row in comparison["rows"]}
    return labels.get(comparison["baseline"], comparison["baseline"])


def percent(comparison: Mapping[str, Any]) -> str:
    return f"{100 * comparison['confidence']:g}%"


def yardsticks(comparison: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Scores by task that no method of the comparison made: single-task LoRAs, base model, most frequent answer."""
    found: dict[str, dict[str, float | None]] = {}
    if scores := comparison["references"]["scores"]:
        found[REFERENCE] = {task: score["mean"] for task, score in scores.items()}
    for name, key in ((BASE, "base"), (MAJORITY, "majority")):
        if comparison[key] is not None:
            found[name] = dict(comparison[key]["tasks"])
    return found


def summary_table(comparison: Mapping[str, Any]) -> Table:
    """One line per method: mean, worst task, Δm%, difference to the baseline, and what it costs.

    Columns of which nothing is known are left out; the notes say why.
    """
    methods = comparison["rows"]
    marks = [mark(row["difference"]) for row in methods]
    top = best([_mean(row["mean"]) for row in methods], marks, _baseline_index(comparison))
    scores = {
        "Mean score": [
            Cell(spread(row["mean"]), mark=marks[index], best=index == top)
            for index, row in enumerate(methods)
        ],
        "Worst task": [Cell(spread(row["worst"]), detail=_worst_tasks(row)) for row in methods],
    }
    more = {
        "Δm%": [spread(row["delta_m"], sign=True) for row in methods],
        f"Difference to {baseline_label(comparison)} [{percent(comparison)}]": [
            _BASELINE if row["name"] == comparison["baseline"] else interval(row["difference"])
            for row in methods
        ],
        "Trained parameters": [number(row["trainable_parameters"], 0) for row in methods],
        "Seconds": [spread(row["seconds"]) for row in methods],
        "Peak memory, MiB": [spread(row["peak_memory_mib"], 0) for row in methods],
    }
    columns = scores | {
        title: [Cell(text) for text in texts]
        for title, texts in more.items()
        if any(text not in (UNKNOWN, _BASELINE) for text in texts)
    }
    labels = [row["label"] for row in methods]
    rows = [Row(label, cells) for label, *cells in zip(labels, *columns.values(), strict=True)]
    blank = [Cell("")] * (len(columns) - len(scores))
    for name, by_task in yardsticks(comparison).items():
        known = {task: score for task, score in by_task.items() if score is not None}
        if known:
            worst = min(known, key=known.__getitem__)
            mean = statistics.fmean(known.values()) if len(known) == len(by_task) else None
            cells = [Cell(number(mean)), Cell(number(known[worst]), detail=worst), *blank]
            rows.append(Row(name, cells, apart=True))
    caption = "Every method over all tasks; scores run from 0 to 100"
    return Table("summary", caption, ["Method", *columns], rows, _notes(comparison))


def task_table(comparison: Mapping[str, Any]) -> Table:
    """One line per task, one column per method."""
    methods, others = comparison["rows"], yardsticks(comparison)
    baseline = _baseline_index(comparison)
    tasks = comparison["tasks"]
    alike = (
        _measured(next(iter(tasks.values())))
        if len({_measured(about) for about in tasks.values()}) == 1
        else ""
    )
    rows = []
    for task, about in tasks.items():
        statistics_ = [row["tasks"].get(task) for row in methods]
        marks = [mark((row["difference"] or {"tasks": {}})["tasks"].get(task)) for row in methods]
        top = best([_mean(statistic) for statistic in statistics_], marks, baseline)
        cells = [
            Cell(spread(statistic), mark=marks[index], best=index == top)
            for index, statistic in enumerate(statistics_)
        ]
        cells += [Cell(number(scores.get(task))) for scores in others.values()]
        rows.append(Row(task, cells, detail="" if alike else _measured(about)))
    columns = ["Task", *(row["label"] for row in methods), *others]
    compared = sum(len(row["difference"]["tasks"]) for row in methods if row["difference"] is not None)
    marked = any(cell.mark for row in rows for cell in row.cells)
    notes = [_marks_note(comparison)] if marked else []
    if compared and not marked:
        notes.append(f"On no task is a method seen above or below {baseline_label(comparison)}.")
    chance = compared * (1 - comparison["confidence"])
    if marked and chance >= 1:
        notes.append(
            f"Of {compared} such intervals about {chance:.0f} would exclude 0 by chance alone if there were no "
            "difference at all: single marks deserve less trust than patterns."
        )
    caption = f"Score of every task ({alike} each)" if alike else "Score of every task"
    return Table("scores-by-task", caption, columns, rows, notes)


def settings_table(comparison: Mapping[str, Any]) -> Table:
    """What each method changes in the recipe, what tuning chose for it, and where its runs stand."""
    rows = [
        Row(
            row["label"],
            [
                Cell(_assignments(row["overrides"])),
                Cell(_assignments(row["tuned"]) if row["tuned"] else UNKNOWN),
                Cell("\n".join(row["runs"])),
            ],
        )
        for row in comparison["rows"]
    ]
    columns = ["Method", "Differs from the recipe in", "Tuned", "Runs, below this page's folder"]
    return Table("settings", "What each method was given", columns, rows, text_columns=range(len(columns)))


def tuning_table(comparison: Mapping[str, Any]) -> Table | None:
    """Validation loss of everything that was tried, or None where nothing was tuned."""
    rows = []
    for row in comparison["rows"]:
        for trial in row["tuning"]:
            chosen = "chosen" if trial["values"] == row["tuned"] else ""
            loss = trial["validation_loss"]  # None: a run did not finish
            rows.append(
                Row(
                    row["label"],
                    [Cell(_assignments(trial["values"])), Cell(spread(loss, 4)), Cell(chosen)],
                )
            )
    if not rows:
        return None
    return Table(
        "tuning",
        "Values tried, and the validation loss that chose between them; test rows were not looked at",
        ["Method", "Tried", "Validation loss", "Choice"],
        rows,
        text_columns=(0, 1, 3),
    )


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    methods = comparison["rows"]
    notes = []
    if len(comparison["seeds"]) > 1:
        notes.append("± is the standard deviation over seeds.")
    else:
        notes.append(
            "One seed only: there is no spread over seeds, so how far a second run would differ is unknown."
        )
    if any(mark(row["difference"]) for row in methods):
        notes.append(_marks_note(comparison))
    if any(row["delta_m"] is not None for row in methods):
        notes.append(
            "Δm% is by how many per cent a task's score falls short, on average, of a LoRA trained on that task alone. "
            "Lower is better; negative beats the specialists."
        )
    if any(row["peak_memory_mib"]["mean"] is not None for row in methods):
        notes.append(f"Peak memory: {comparison['memory']}.")
    if comparison["references"]["reason"] and all(row["delta_m"] is None for row in methods):
        notes.append(f"Δm% is not given: {comparison['references']['reason']}.")
    else:
        notes += _reasons("Δm%", [(row["label"], row["delta_m_reason"]) for row in methods])
    for name, key in ((BASE, "base"), (MAJORITY, "majority")):
        if comparison[f"{key}_reason"]:
            notes.append(f"{name}: {comparison[f'{key}_reason']}.")
    others = [row for row in methods if row["name"] != comparison["baseline"]]
    return notes + _reasons("Difference", [(row["label"], row["difference_reason"]) for row in others])


def _reasons(what: str, reasons: Sequence[tuple[str, str | None]]) -> list[str]:
    """One note per reason, naming the methods that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for label, reason in reasons:
        if reason:
            by_reason.setdefault(reason, []).append(label)
    return [f"{what} unknown for {listed(labels)}: {reason}." for reason, labels in by_reason.items()]


def _marks_note(comparison: Mapping[str, Any]) -> str:
    baseline = baseline_label(comparison)
    return (
        f"▲ and ▼ are seen above or below {baseline}: the {percent(comparison)} interval of the difference excludes 0. "
        f"Bold is the highest of the methods, where it is seen above {baseline}; methods other than {baseline} are not "
        "tested against each other."
    )


def _measured(task: Mapping[str, Any]) -> str:
    return f"{task['metric']}, {plural(task['n'], 'test row')}"


def _worst_tasks(row: Mapping[str, Any]) -> str:
    tasks = (row["worst"] or {}).get("tasks") or []
    return "\n".join(dict.fromkeys(task for task in tasks if task is not None))


def _baseline_index(comparison: Mapping[str, Any]) -> int | None:
    names = [row["name"] for row in comparison["rows"]]
    return names.index(comparison["baseline"]) if comparison["baseline"] in names else None


def _mean(statistic: Mapping[str, Any] | None) -> float | None:
    return None if statistic is None else statistic["mean"]


def _assignments(values: Mapping[str, Any]) -> str:
    """`key=value` as on the command line, one a line."""
    return "\n".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    )
