"""The data report of a run: counts per task, and fingerprints that show whether rows have changed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from braidlora.tasks._task import PARTS, Part, Row, Task
from braidlora.tasks.dataset import MultiTaskDataset
from braidlora.tasks.load import prompt_key
from braidlora.tasks.templates import Template


def fingerprints(tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """sha256 of the rows of each task and part, by task name and part; their order matters."""
    return {task.name: {part: _sha256_rows(task.rows(part)) for part in PARTS} for task in tasks}


def fingerprint(tasks: Sequence[Task]) -> str:
    """One sha256 over all tasks' names, kinds, templates, labels and rows."""
    described = [
        [task.name, task.kind, _described(task.template), task.labels, prints]
        for task, prints in zip(tasks, fingerprints(tasks).values(), strict=True)
    ]
    return _sha256(described)


def read_lines(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the tables of a task were read, e.g. `train: CSV, delimiter semicolon, encoding cp1252 (both detected)`.

    Args:
        parts: of one task in the data report.
    """
    by_text: dict[str, list[str]] = {}
    for part, counts in parts.items():
        if counts.get("read_as"):
            by_text.setdefault(counts["read_as"], []).append(part)
    return [f"{', '.join(names)}: {text}" for text, names in by_text.items()]


def size_line(task: Task) -> str:
    """How many rows each part of a task has, and how one file was divided.

    E.g. `600 rows: 480 train, 60 validation, 60 test (split holds out validation and test)`.
    """
    sizes = ", ".join(f"{len(task.rows(part))} {part}" for part in PARTS if task.rows(part))
    held = [part for part in PARTS if part in task.counts and task.counts[part].held_out]
    if not held:
        return f"{sizes} rows"
    train = task.counts["train"]
    drawn = train.kept + train.cut
    text = f"{drawn} rows"
    if train.not_drawn:
        text += f" (train.limit, of {drawn + train.not_drawn})"
    notes = [f"split holds out {' and '.join(held)}"]
    if train.not_drawn:
        notes.append("from the rows that train.limit draws")
    notes += [
        f"{part}.limit draws from {task.counts[part].read}" for part in held if task.counts[part].not_drawn
    ]
    return f"{text}: {sizes} ({', '.join(notes)})"


def _described(template: Template) -> dict[str, Any]:
    """The template's fields; those of later versions only where they are set, so that fingerprints stay the same."""
    fields = asdict(template)
    return fields if template.variables else {key: fields[key] for key in fields if key != "variables"}


def data_report(
    tasks: Sequence[Task], datasets: Mapping[Part, MultiTaskDataset] | None = None
) -> dict[str, Any]:
    """The contents of a run's `data.json`.

    Args:
        tasks: the loaded tasks.
        datasets: the encoded parts, for the counts of dropped and truncated rows.

    Returns:
        `{"fingerprint": …, "tasks": {name: {part: {"rows", "sha256", "read", "filtered", "skipped", …, "encoded"}}}}`;
        for test rows also `in_train`, the number of test rows whose prompt is also in the training rows, and
        `unseen_labels`, those of a label task that no training row has, if there are any.
    """
    prints = fingerprints(tasks)
    report: dict[str, Any] = {"fingerprint": fingerprint(tasks), "tasks": {}}
    for task in tasks:
        parts: dict[str, Any] = {}
        for part in PARTS:
            if not task.rows(part):
                continue
            parts[part] = {"rows": len(task.rows(part)), "sha256": prints[task.name][part]}
            if part in task.counts:
                parts[part].update(asdict(task.counts[part]))
            if datasets is not None and part in datasets:
                parts[part]["encoded"] = asdict(datasets[part].counts[task.name])
        if task.test:
            trained = {prompt_key(row) for row in task.train}
            parts["test"]["in_train"] = sum(prompt_key(row) in trained for row in task.test)
            if unseen := _unseen_labels(task):
                parts["test"]["unseen_labels"] = unseen
        report["tasks"][task.name] = parts
    return report


def _unseen_labels(task: Task) -> dict[str, int]:
    """Answers of a label task's test rows that no training row has, each with the number of its test rows."""
    if not task.train or not (task.kind == "classify" or task.options):
        return {}
    key = "label" if task.kind == "classify" else "output"
    known = {str(row[key]) for row in task.train}
    counts = Counter(str(row[key]) for row in task.test if key in row)
    return {label: count for label, count in counts.items() if label not in known}


def _sha256(value: Any) -> str:
    return hashlib.sha256(_json(value).encode("utf-8")).hexdigest()


def _sha256_rows(rows: Sequence[Row]) -> str:
    """`_sha256` of the list of rows, without holding the JSON of all rows in memory."""
    digest = hashlib.sha256(b"[")
    for index, row in enumerate(rows):
        digest.update((("," if index else "") + _json(row)).encode("utf-8"))
    digest.update(b"]")
    return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
