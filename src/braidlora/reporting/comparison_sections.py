"""The sections of a comparison's report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braidlora.reporting import comparison_plots, comparison_tables
from braidlora.reporting.loss_plots import loss_plots
from braidlora.reporting.sections import Headline, Section, origin_section
from braidlora.runs import RunDirectory
from braidlora.tables import plural


def comparison_headline(comparison: Mapping[str, Any]) -> Headline:
    """The verdict, then what it is based on."""
    tasks, seeds, rows = comparison["tasks"], comparison["seeds"], comparison["rows"]
    facts = [
        plural(len(rows), "method"),
        f"{plural(len(seeds), 'seed')} ({', '.join(map(str, seeds))})",
        plural(len(tasks), "task"),
        plural(sum(task["n"] for task in tasks.values()), "test row"),
        plural(sum(len(row["runs"]) for row in rows), "run"),
    ]
    if len(rows) > 1:
        facts.append(f"baseline {comparison_tables.baseline_label(comparison)}")
    advice = comparison.get("advice")
    if advice is None:  # of an earlier version
        return Headline("Comparison", comparison["recipe"]["name"], comparison["verdict"], facts)
    verdict = [advice["what"], f"Confidence: {advice['sure']}", f"Next: {advice['next']}"]
    return Headline("Comparison", comparison["recipe"]["name"], verdict, facts, advice["findings"])


def comparison_sections(comparison: Mapping[str, Any], directory: Path) -> list[Section]:
    """Scores, tasks, sweep, training, tuning.

    Raises:
        CheckpointError: a run's log is damaged.
    """
    sections = [
        Section(
            "overall",
            "Over all tasks",
            tables=[comparison_tables.summary_table(comparison)],
            plots=_drawn(comparison_plots.difference_plot(comparison)),
        )
    ]
    if details := comparison.get("details"):
        sections.append(Section("details", "In words", text=details))
    if sweep := comparison_plots.sweep_plot(comparison):
        sections.append(Section("sweep", "Sweep", plots=[sweep]))
    sections.append(
        Section(
            "tasks",
            "Task by task",
            tables=[comparison_tables.task_table(comparison)],
            plots=_drawn(
                comparison_plots.task_plot(comparison), comparison_plots.task_difference_plot(comparison)
            ),
        )
    )
    losses = loss_plots(comparison, directory)
    runs = [run for row in comparison["rows"] for run in row["runs"]]
    missing = [run for run in runs if not RunDirectory(directory / run).log.is_file()]
    notes = [f"Missing from the curves because they have no log: {', '.join(missing)}."] if missing else []
    sections.append(Section("training", "Training", text=notes, plots=losses))
    if tuning := comparison_tables.tuning_table(comparison):
        sections.append(Section("tuning-choice", "Tuning", tables=[tuning]))
    return sections


def comparison_origin(comparison: Mapping[str, Any]) -> Section:
    """Command, recipe, what each method changes in it, and the environment."""
    return origin_section(
        comparison["command"],
        comparison["recipe"]["yaml"],
        comparison["environment"],
        [comparison_tables.settings_table(comparison)],
    )


def _drawn(*plots: Any) -> list[Any]:
    return [plot for plot in plots if plot is not None]
