"""`compare`: methods × seeds on one recipe, from the plan to the table and its verdict."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from braidlora.adapters.sharing import PRESETS, SCHEMES
from braidlora.analysis import analyze_run
from braidlora.analysis.output import as_written
from braidlora.comparison import _checks as checks
from braidlora.comparison._advice import advise
from braidlora.comparison._cells import Cell, refuse_other_runs
from braidlora.comparison._plan import Plan
from braidlora.comparison._progress import Work
from braidlora.comparison._ray import RayCells, RaySettings
from braidlora.comparison._references import (
    References,
    base_entry,
    given_references,
    majority_entry,
    no_references,
    trained_references,
)
from braidlora.comparison._results import RowRuns, keeps_references, paired_differences, row_entry
from braidlora.comparison._rows import Row, Sweep, build_rows, built_in_labels
from braidlora.comparison._runner import CellRunner
from braidlora.comparison._tables import as_markdown
from braidlora.comparison._tuning import auto_grid, choose
from braidlora.comparison._verdict import details, verdict
from braidlora.config import RunConfig, dump_config, override_config
from braidlora.errors import CheckpointError, ConfigError, DataError, TrainingError, explain_write_failures
from braidlora.reporting.page import write_report
from braidlora.runs import atomic_write_json, atomic_write_text, cover, hold, remove_leftovers, uncover
from braidlora.tasks import size_line
from braidlora.terminal import say
from braidlora.training.threads import cpu_threads

RECIPE, RESULT, TABLE = "recipe.yaml", "comparison.json", "comparison.md"
REPORT, ANALYSIS = "report.html", "analysis.json"
CONFIDENCE = 0.95


def compare(
    recipe: RunConfig,
    *,
    name: str = "recipe",
    methods: Sequence[str] | None = None,
    rows: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: str | None = None,
    references: Literal["single-task", "none"] | None = None,
    tune: Mapping[str, Sequence[Any]] | Literal["auto"] | None = None,
    sweep: Sweep | None = None,
    workers: int | Literal["auto"] = "auto",
    ray: RaySettings | None = None,
    overwrite: bool = False,
    report: bool = True,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Train the recipe with several methods and seeds, and say which is better and whether that is significant.

    Every run is a run directory below `OUTPUT/cells`. Finished runs are reused and stopped ones resumed, so the same
    call after a kill ends with the same numbers. Each run has `training.threads` threads (by default one), so its
    numbers do not depend on how many run in parallel.

    Args:
        recipe: everything is written to its `output`; `adapter.method` and `seed` are set for each run.
        name: of the recipe in the tables.
        methods: built-in rows: `lora`, `lora-matched` (at the rank at which LoRA trains as many parameters as
            ALoRA), `hydralora`, `moelora`, `alora`, which are the default, `mtl-lora` and `align-lora`; `all` of
            them with ["all"]. With a sweep, by default LoRA and the recipe's method.
        rows: custom rows by name: a PEFT configuration (with `peft_type`), or values of the recipe by dotted key.
        seeds: three or more, to distinguish a difference from chance.
        baseline: the row that the others are compared with; by default `lora`, or the first row without one.
        references: `single-task` trains a LoRA per task and seed, which Δm% needs; `none` uses the recipe's own
            `evaluation.references`, if it has any. By default `single-task`, or `none` with one task, where the
            single-task LoRA is the row `lora`.
        tune: values to try by dotted key, the same for every row; the lowest validation loss (mean over seeds)
            decides. Test rows are scored only with the chosen values. The references use the values chosen for LoRA.
            `auto` tries three learning rates around the recipe's.
        sweep: turns every row into one per value.
        workers: number of processes; `auto` decides by cores, memory and GPU.
        ray: run the cells on Ray instead, on this machine or a cluster; `workers` is then `auto`.
        overwrite: train everything again.
        report: also write `report.html`.
        command: the command shown below the tables.
        progress: one line per run on stderr.

    Returns:
        the content of `comparison.json`. Failed runs are in `failed`, and their seeds are missing in their row. A value
        with which tuning failed is not chosen.

    Raises:
        ConfigError, DataError: the recipe, a row or a value is not valid; nothing has been written.
        CheckpointError: the folder holds runs of another recipe, other data or another base.
        TrainingError: no row has a finished run, a worker was killed, or a file cannot be written.
        Interrupted: SIGTERM or Ctrl-C; the same call resumes.
    """
    if ray is not None and workers != "auto":
        raise ConfigError(
            f"--workers {workers}: with --engine ray, --cell-cpus and --cell-gpus decide how many runs fit at once."
        )
    if recipe.training.threads is None:
        recipe = override_config(recipe, {"training.threads": 1})
    directory = checks.check_directory(recipe.output, RECIPE)
    with hold(directory):
        checks.check_directory(recipe.output, RECIPE)  # again: another process may have held the lock
        tune = auto_grid(recipe) if tune == "auto" else tune
        plan = Plan(recipe, directory, checks.check_seeds(seeds), tune or {})
        tasks = plan.data.tasks(recipe)
        checks.check_tasks(tasks, tuned=bool(tune))
        doubts = checks.check_rows(tasks, recipe)
        table = build_rows(recipe, _methods(methods, recipe, sweep), rows or {}, sweep, tasks)
        baseline = _baseline(baseline, table)
        checks.check_grid(plan.tune, table)
        trials = {row.name: [plan.trial(row, values) for values in plan.grid(row)] for row in table}
        tried = [trial.cells[seed] for seed in plan.seeds for points in trials.values() for trial in points]
        if progress and not all(cell.is_done() for cell in tried):
            for task in tasks:
                say(f"{task.name}  {size_line(task)}", file=sys.stderr)
        base = [plan.base()] if recipe.kind == "generate" else []
        checks.check_names(tried)
        checks.check_adapters(tried)

        def work(cell: Cell) -> Work:
            whole = len(cell.config.tasks) == len(recipe.tasks)  # else its rows would be read again
            return Work.of(cell, plan.data.tasks(cell.config) if whole else tasks)

        connect = None if ray is None else partial(RayCells, ray, recipe, directory, RECIPE)
        runner = CellRunner(recipe, workers, progress, work, overwrite, connect)
        if report:
            checks.check_report()
        _clear_or_refuse([*tried, *base], overwrite)
        with (
            explain_write_failures(directory, "then run the same command again; finished runs are kept"),
            closing(runner),
        ):
            remove_leftovers(directory)
            remove_leftovers(directory / "figures")
            uncover(directory, RECIPE)  # it contains the folder's path, which may have changed
            atomic_write_text(directory / RECIPE, dump_config(recipe))
            if tune:
                runner.run([replace(cell, evaluate=False) for cell in tried])
            chosen = {row: choose(points, runner.failures) for row, points in trials.items()}
            for_lora = chosen["lora"][0].values if "lora" in chosen else {}
            singles = _singles(plan, table, for_lora, references)
            alone = [cell for cells in singles.values() for cell in cells.values()]
            _clear_or_refuse(alone, overwrite)
            scored = [trial.cells[seed] for seed in plan.seeds for trial, _ in chosen.values()]
            last = [*scored, *alone, *base]
            runner.run(last)

            finished = [
                RowRuns(row, cells, trial.values, losses)
                for row in table
                for trial, losses in [chosen[row.name]]
                if (cells := trial.finished())
            ]
            if not finished:
                reasons = "\n  ".join(f"{run}: {reason}" for run, reason in runner.failures.items())
                raise TrainingError(f"no run finished:\n  {reasons}")
            result: dict[str, Any] = {
                "format": 1,
                "recipe": {"name": name, "yaml": dump_config(recipe)},
                "command": command,
                "seeds": plan.seeds,
                "baseline": baseline,
                "confidence": CONFIDENCE,
                "settings": recipe.training.model_dump(include={"learning_rate", "epochs", "max_steps"}),
                "sweep": sweep and {"key": sweep.key, "values": sweep.values, "matched": sweep.matched},
                **_rows(finished, _references(singles, plan, for_lora), baseline, directory),
                **base_entry(base[0] if base else None, runner.failures),
                **majority_entry(tasks),
                "warnings": doubts,
                "failed": [
                    {"run": cell.name, "reason": runner.failures[cell.name]}
                    for cell in last
                    if cell.name in runner.failures
                ],
            }
            result["advice"] = advise(result)
            result["details"] = details(result)
            result["verdict"] = verdict(result, result["advice"])
            _write(directory, result, finished, recipe.training.threads, report)
        return result


def _write(
    directory: Path, result: dict[str, Any], finished: Sequence[RowRuns], threads: int | None, report: bool
) -> None:
    uncover(directory, "")
    for older in (REPORT, ANALYSIS):  # they do not belong to the new table
        (directory / older).unlink(missing_ok=True)
    atomic_write_json(directory / RESULT, result)
    atomic_write_text(directory / TABLE, as_markdown(result))
    if report:
        analysis = _analyze_one_run(finished, threads)
        if analysis is not None:
            atomic_write_json(directory / ANALYSIS, as_written(analysis, result["command"]))
        write_report(directory, result, analysis)
    cover(directory, [name for name in (RECIPE, RESULT, TABLE, ANALYSIS) if (directory / name).is_file()])


def _analyze_one_run(rows: Sequence[RowRuns], threads: int | None) -> dict[str, Any] | None:
    """The analysis of one run with a router, as an example; None if no row has experts, or it cannot be analyzed.

    It is the first seed of ALoRA, else of HydraLoRA, else of MoE-LoRA.
    """
    for scheme in SCHEMES.values():
        for row in rows:
            cell = next(iter(row.cells.values()))
            if cell.config.adapter.method == scheme.method and cell.config.adapter.num_experts > 1:
                try:
                    with cpu_threads(threads):
                        return analyze_run(cell.run.path)
                except (ConfigError, DataError, CheckpointError, TrainingError) as error:
                    # Such as an adapter of stacked experts alone. The comparison itself is complete without it.
                    warnings.warn(f"the report has no analysis of {cell.name}: {error}", stacklevel=2)
                    return None
    return None


def _rows(
    finished: Sequence[RowRuns], references: References, baseline: str, directory: Path
) -> dict[str, Any]:
    """The rows, and what is the same for all of them."""
    first = next(iter(finished[0].cells.values()))
    tasks, environment = first.metrics()["tasks"], dict(first.run.read_json(first.run.environment.name))
    environment.pop("resumed", None)
    difference = paired_differences(finished, baseline, CONFIDENCE)
    return {
        # Of the first run: this process may not have trained anything.
        "environment": environment,
        "memory": first.note()["memory"],
        "tasks": {task: {key: one[key] for key in ("metric", "n")} for task, one in tasks.items()},
        "data": first.run.read_json(first.run.data.name)["tasks"],
        "references": references.entry,
        "rows": [
            {**row_entry(runs, references, directory), **difference[runs.row.name]} for runs in finished
        ],
    }


def _methods(given: Sequence[str] | None, recipe: RunConfig, sweep: Sweep | None) -> list[str]:
    if given == ["all"]:
        return list(built_in_labels())
    if given is not None:
        return list(given)
    if sweep is None or not isinstance(recipe.adapter.method, str):
        return [name for name in built_in_labels() if name not in PRESETS]
    return list(dict.fromkeys(["lora", recipe.adapter.method]))


def _baseline(given: str | None, rows: Sequence[Row]) -> str:
    names = [row.name for row in rows]
    if given is None:
        return "lora" if "lora" in names else names[0]
    if given not in names:
        raise ConfigError(f"--baseline: no row {given!r}; the rows are {', '.join(names)}.")
    return given


def _clear_or_refuse(cells: Sequence[Cell], overwrite: bool) -> None:
    if overwrite:
        for cell in cells:
            cell.clear()
    refuse_other_runs(cells)


def _singles(
    plan: Plan, table: Sequence[Row], values: Mapping[str, Any], references: str | None
) -> dict[str, dict[int, Cell]]:
    """The single-task runs by task and seed, if they were requested and a row can use them."""
    if references is None:
        references = "single-task" if len(plan.recipe.tasks) > 1 else "none"
    if references == "none" or not any(map(keeps_references, table)):
        return {}
    return {
        task.name: plan.single(task, values)
        for task in plan.data.tasks(plan.recipe)
        if task.train and task.test
    }


def _references(
    singles: Mapping[str, Mapping[int, Cell]], plan: Plan, values: Mapping[str, Any]
) -> References:
    given = plan.recipe.evaluation.references
    if singles:
        return trained_references(singles, plan.seeds, values, plan.directory)
    if given:
        return given_references(given, plan.seeds)
    return no_references("no single-task LoRAs were trained (--single-task trains them)")
