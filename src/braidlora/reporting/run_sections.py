"""The report of one training run: scores, wrong answers, losses, and what to know first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError
from braidlora.reporting.confusion import Confusion, confusion, confusion_plot
from braidlora.reporting.findings import (
    Learned,
    data_findings,
    learn_more,
    learned,
    task_list,
    tasks_by_learned,
    too_few_rows,
    undecided,
)
from braidlora.reporting.loss_plots import draw_losses, read_losses
from braidlora.reporting.sections import Headline, Section, origin_section
from braidlora.runs import RunDirectory, parse_jsonl, read_adapter_card
from braidlora.tables import UNKNOWN, Table, TableCell, TableRow, number, plural

_WRONG = 10  # wrong answers shown of each task
_LONGEST = 300  # characters of a prompt, of which the end is shown


def read_run(directory: Path, command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the report of a finished run shows, read from its files.

    Args:
        directory: the run directory.
        command: that runs it again.
        settings: `learning_rate`, `epochs` and `max_steps` of its recipe.

    Raises:
        CheckpointError: a file is missing or has changed.
    """
    run = RunDirectory(directory)
    metrics = run.read_json(run.metrics.name)
    card = read_adapter_card(run.adapter)
    labels = {task.name: task.labels or task.options for task in card.tasks} if card is not None else {}
    return {
        "name": directory.name,
        "command": command,
        "settings": dict(settings),
        "recipe": run.read(run.config.name).decode(),
        "environment": run.read_json(run.environment.name),
        "metrics": metrics,
        "data": run.read_json(run.data.name)["tasks"],
        "labels": labels,
        "predictions": {
            task: parse_jsonl(
                run.predictions / f"{task}.jsonl", run.read(f"{run.predictions.name}/{task}.jsonl")
            )
            for task in metrics["tasks"]
        },
    }


def run_findings(run: Mapping[str, Any]) -> list[str]:
    """What to know before the scores, one line each."""
    metrics = run["metrics"]
    found = data_findings(run["data"])
    majority = metrics.get("majority")
    if majority and _learned(metrics) != "no":
        scores, rows = _scores(metrics)
        if tasks := tasks_by_learned(scores, majority, rows, "no"):
            found.append(
                f"Not learned: {task_list(tasks)}; the score does not beat always giving the most frequent "
                "answer. Check these tasks' rows, and train longer or raise the learning rate."
            )
        tasks = tasks_by_learned(scores, majority, rows, "undecided")
        if tasks and _learned(metrics) != "undecided":
            found.append(too_few_rows(tasks))
    if unparsed := {
        name: task["unparsed"] for name, task in metrics["tasks"].items() if task.get("unparsed")
    }:
        counts = ", ".join(
            f"{name} {count} of {metrics['tasks'][name]['n']}" for name, count in unparsed.items()
        )
        found.append(f"Answers without a recognizable option or number count as wrong: {counts}.")
    return found


def run_advice(run: Mapping[str, Any]) -> list[str]:
    """The result, with what confidence, and what to do next."""
    metrics = run["metrics"]
    tasks = metrics["tasks"]
    if not tasks:
        return ["Nothing was scored: no task has test rows.", "Next: hold some out with --split.test=0.1."]
    rows = sum(task["n"] for task in tasks.values())
    sure = (
        f"Confidence: one run with one seed, {plural(rows, 'test row')}; another seed may score differently."
    )
    answer = _learned(metrics)
    if answer in ("no", "undecided"):
        often = metrics["majority"]
        majority = number(sum(often[task] for task in tasks) / len(tasks))
        what = (
            undecided(rows, number(metrics["mean"]), majority)
            if answer == "undecided"
            else f"Nothing was learned: the mean score, {number(metrics['mean'])}, does not beat always giving the "
            f"most frequent answer ({majority})."
        )
        first = "Add test rows. " if answer == "undecided" else ""
        return [what, sure, f"Next: {first}{learn_more(run['settings'])}"]
    what = f"Mean score {number(metrics['mean'])} over {plural(len(tasks), 'task')}"
    if len(tasks) > 1:
        what += f", lowest on {metrics['worst_task']} ({number(metrics['worst'])})"
    return [
        f"{what}.",
        sure,
        "Next: `braidlora compare` with the same recipe and three seeds shows whether another method does better; "
        "`braidlora predict` answers new rows.",
    ]


def run_headline(run: Mapping[str, Any]) -> Headline:
    """The top of the page."""
    metrics = run["metrics"]
    facts = [
        plural(len(metrics["tasks"]), "task"),
        plural(sum(task["n"] for task in metrics["tasks"].values()), "test row"),
        f"{number(metrics['trainable_parameters'], 0)} trained parameters",
        f"{number(metrics['seconds'], 0)} s",
    ]
    return Headline("Training run", run["name"], run_advice(run), facts, run_findings(run))


def run_sections(run: Mapping[str, Any], directory: Path) -> list[Section]:
    """Scores, wrong answers, losses."""
    sections = [Section("scores", "Scores", tables=[_score_table(run)])]
    matrices = {
        task: found
        for task, records in run["predictions"].items()
        if (found := confusion(records, run["labels"].get(task))) is not None
    }
    if matrices:
        sections.append(
            Section(
                "labels",
                "Label by label",
                plots=[confusion_plot(task, found) for task, found in matrices.items()],
                more_tables=[_label_table(task, found) for task, found in matrices.items()],
            )
        )
    if wrong := [
        table for task, records in run["predictions"].items() if (table := _wrong_table(task, records))
    ]:
        sections.append(Section("wrong", "Wrong answers", tables=wrong))
    elif run["predictions"]:
        sections.append(Section("wrong", "Wrong answers", text=["Every answer is correct."]))
    sections.append(Section("training", "Training", plots=_losses(run, directory)))
    return sections


def run_origin(run: Mapping[str, Any]) -> Section:
    """Command, recipe and environment."""
    return origin_section(run["command"], run["recipe"], run["environment"])


def _scores(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, int]]:
    tasks = metrics["tasks"].items()
    return {name: task["score"] for name, task in tasks}, {name: task["n"] for name, task in tasks}


def _learned(metrics: Mapping[str, Any]) -> Learned | None:
    majority = metrics.get("majority")
    return learned(_scores(metrics)[0], majority, _scores(metrics)[1]) if majority else None


def _score_table(run: Mapping[str, Any]) -> Table:
    metrics, majority = run["metrics"], run["metrics"].get("majority") or {}
    rows = [
        TableRow(
            name,
            [
                task["metric"],
                number(task["score"]),
                number(majority.get(name)),
                str(task["n"]),
                number(run["data"].get(name, {}).get("train", {}).get("rows"), 0),
            ],
        )
        for name, task in metrics["tasks"].items()
    ]
    if len(rows) > 1:
        often = sum(majority.values()) / len(majority) if len(majority) == len(rows) else None
        rows.append(TableRow("Mean", ["", number(metrics["mean"]), number(often), "", ""], apart=True))
    columns = ["Task", "Metric", "Score", "Most frequent answer", "Test rows", "Training rows"]
    notes = ["Most frequent answer: the test score of always giving the most frequent training answer."]
    return Table("scores-table", "Scores run from 0 to 100", columns, rows, notes, text_columns=(0, 1))


def _label_table(task: str, found: Confusion) -> Table:
    rows = [
        TableRow(label, [number(found.recall(label)), number(found.precision(label))])
        for label in found.labels
    ]
    return Table(
        f"labels-{''.join(c if c.isalnum() else '-' for c in task)}",
        f"Labels of {task}, in percent",
        ["Label", "Found (recall)", "Correct when given (precision)"],
        rows,
    )


def _wrong_table(task: str, records: Sequence[Mapping[str, Any]]) -> Table | None:
    wrong = [record for record in records if record["score"] < 100.0]
    if not wrong:
        return None
    shown = sorted(wrong, key=lambda record: record["score"])[:_WRONG]
    rows = [
        TableRow(
            str(record["index"]),
            [_end(record["prompt"]), _text(record["reference"]), TableCell(_text(record["prediction"]))],
        )
        for record in shown
    ]
    return Table(
        f"wrong-{''.join(c if c.isalnum() else '-' for c in task)}",
        f"{task}: {plural(len(wrong), 'wrong or partly wrong answer')} of {len(records):,}"
        + (f"; the {len(shown)} with the lowest scores" if len(shown) < len(wrong) else ""),
        ["Test row", "Prompt", "Reference", "Prediction"],
        rows,
        [f"All are in predictions/{task}.jsonl."],
        text_columns=(0, 1, 2, 3),
    )


def _text(value: Any) -> str:
    text = " | ".join(map(str, value)) if isinstance(value, list) else str(value)
    return _end(text) or UNKNOWN


def _end(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _LONGEST else f"…{text[-_LONGEST:]}"


def _losses(run: Mapping[str, Any], directory: Path) -> list[Any]:
    plots = []
    for name, key, title in (
        ("training-loss", "tasks", "Training loss"),
        ("validation-loss", "validation_tasks", "Validation loss"),
    ):
        try:
            curves = read_losses(RunDirectory(directory).log, key)
        except CheckpointError:
            continue
        if curves:
            plots.append(draw_losses(name, title, list(curves), {run["name"]: [curves]}, [0]))
    return plots
