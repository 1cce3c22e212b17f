"""`export`: an adapter as a LoRA that PEFT loads without braidlora, or merged into its base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from braidlora import __version__
from braidlora.adapters import factored_to_lora, multi_to_lora
from braidlora.config import RunConfig
from braidlora.errors import ConfigError, explain_write_failures
from braidlora.export.base import (
    load_base_alone,
    load_run,
    load_with_tasks,
    recipe_for,
    refuse_quantized,
)
from braidlora.export.cost import measure_cost
from braidlora.export.merge import merge_and_save
from braidlora.export.source import Source, read_source
from braidlora.export.static_weights import OfTask, StaticWeights, measure, wanted_weights
from braidlora.export.write import (
    copied,
    how,
    left_in,
    manifest_of,
    refuse_to_replace,
    write_lora,
    write_record,
)
from braidlora.models.loading import Loaded
from braidlora.paths import expanded
from braidlora.runs import commit_directory, hold
from braidlora.tasks import Task, load_tasks

_ROWS = 256


def export(
    target: str | Path,
    output: str | Path | None = None,
    *,
    static_weights: str | None = None,
    weights_from: str | Path | None = None,
    rows: int | None = None,
    merge: bool = False,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
    score: bool = True,
    unchanged: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the adapter of `target` as a plain LoRA, or merged into its base.

    Exact for LoRA, factored LoRA, multi-LoRA with one expert or equal weights, and, for one task (`task=NAME`), with
    weights by task. A token-routed adapter needs `static_weights`; the cost of that is measured if a recipe with test
    rows is available.

    Args:
        target: a run directory, or an adapter folder in PEFT's format.
        output: an empty folder or an earlier export; by default next to the target.
        static_weights: `task=NAME`, `uniform`, or one number per expert.
        weights_from: the run with task NAME, if it is not the target's own.
        rows: the most training rows of the task on which the routers are measured; by default 256.
        merge: write the full model with the LoRA added to its weights.
        recipe: tasks, prompts and base of an adapter outside a run.
        overrides: `dotted.key=value` for the recipe, the target's own or the given one.
        base: the base model, if it is not the one in the recipe or adapter.
        score: False does not measure the cost.
        unchanged: copy an adapter that has no exact LoRA form as it is, to be loaded with braidlora.
        overwrite: replace an earlier export.
        progress: show progress bars on stderr.

    Returns:
        the content of `export.json`, and `directory`.

    Raises:
        ConfigError: the target cannot be exported this way, an option would have no effect, or the output is taken.
        CheckpointError: the adapter is damaged, pickled, or does not fit its base.
        DataError: the task's rows cannot be read.
        TrainingError: the output cannot be written.
    """
    source = read_source(target, any_kind=unchanged)
    as_it_is = unchanged and not source.has_exact_lora
    wanted = None if as_it_is else wanted_weights(source, static_weights)
    output = _folder(output) if output is not None else _default_output(target, wanted, merge)
    with hold(output, adjacent=True):
        refuse_to_replace(output, overwrite=overwrite)
        config = recipe_for(source, recipe, weights_from, overrides, base)
        if merge:
            refuse_quantized(config)
        unscored = "the adapter is copied unchanged" if as_it_is else _why_no_scores(source, config, score)
        measured = isinstance(wanted, str)
        _refuse_without_effect(
            {
                "--rows-per-task": rows,
                "--weights-from": weights_from
                if recipe is not None or source.origin.place is not None
                else None,
            },
            "" if measured else "it is for --static-weights=task=NAME, which measures a task's weights",
        )
        _refuse_without_effect(
            {
                "--recipe": recipe,
                "--base": base,
                "--weights-from": weights_from,
                **{f"--{override}": override for override in overrides},
            },
            ""
            if merge or measured or not unscored
            else f"no base model is needed, because nothing is measured: {unscored}",
        )
        loaded = load_with_tasks(source, config) if measured or not unscored else None
        task = wanted.name if isinstance(wanted, OfTask) else None
        fixed = _weights(wanted, loaded, weights_from, rows or _ROWS)
        before = manifest_of(output)
        with (
            explain_write_failures(output, "or give another --output", lambda: left_in(output, before)),
            commit_directory(output) as staging,
            TemporaryDirectory() as scratch,
        ):
            folder = Path(scratch) if merge else staging
            converted = (None, source.config) if as_it_is else _convert(source, fixed, task)
            saved = write_lora(folder, source, *converted)
            record: dict[str, Any] = {
                "braidlora": __version__,
                "source": {"path": str(target), "peft_type": source.kind, "what": source.describe()},
                "form": "merged" if merge else "adapter" if as_it_is else "lora",
                "rank": saved.get("r"),
                "exact": fixed is None,
                "how": copied(source) if as_it_is else how(source, saved["r"], fixed, task),
                **({} if task is None else {"task": task}),
                "static_weights": None if fixed is None else fixed.to_json(),
                "cost": None,
            }
            if loaded is not None and not unscored:
                record["cost"] = measure_cost(
                    loaded, folder, _scored_tasks(loaded, wanted), source.origin.place, progress
                )
                unscored = "" if record["cost"] else "no task has test rows"
            record["cost_reason"] = unscored or None
            loaded = None  # do not hold a large base twice
            if merge:
                record["merge"] = merge_and_save(*load_base_alone(source, config, base), folder, staging)
                # The merged model is its own base.
                source.origin.described().model_copy(update={"base": None}).write(staging)
            write_record(staging, record, saved)
        return {**record, "directory": str(output)}


def _refuse_without_effect(given: Mapping[str, object], why: str) -> None:
    for option, value in given.items():
        if why and value is not None:
            raise ConfigError(f"{option} has no effect here: {why}. Leave it out.")


def _folder(output: str | Path) -> Path:
    """The folder that --output names, as a path that ends in a name: temporary folders are created next to it."""
    if not str(output).strip():
        raise ConfigError("--output: is empty; expected a folder.")
    path = expanded(output)
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    if not path.name:
        raise ConfigError(f"--output: {path} cannot be an export; choose an empty folder.")
    return path


def _default_output(target: str | Path, wanted: str | Tensor | OfTask | None, merge: bool) -> Path:
    path = expanded(target)
    if path.name in ("", ".."):
        path = path.resolve()
    name = wanted.name if isinstance(wanted, OfTask) else wanted
    ending = f"-{name}" if isinstance(name, str) else ""
    return path.with_name(f"{path.name}-{'merged' if merge else 'lora'}{ending}")


def _why_no_scores(source: Source, config: RunConfig | None, score: bool) -> str:
    if not source.routed:
        return "the exported LoRA equals the adapter exactly"
    if not score:
        return "--no-scores was given"
    if config is None:
        return "there was no recipe with test rows (--recipe RECIPE gives one)"
    return ""


def _weights(
    wanted: str | Tensor | OfTask | None, loaded: Loaded | None, weights_from: str | Path | None, rows: int
) -> StaticWeights | None:
    """The requested expert weights, measured if they are a task's."""
    if wanted is None or isinstance(wanted, OfTask):
        return None
    if isinstance(wanted, Tensor):
        return StaticWeights(wanted)
    assert loaded is not None
    tasks, prompt = loaded.tasks, loaded.config.prompt
    if weights_from is not None:
        other = load_run(weights_from)
        tasks, prompt = load_tasks(other), other.prompt
    named = [task for task in tasks if task.name == wanted]
    if not named:
        known = ", ".join(task.name for task in tasks)
        raise ConfigError(f"--static-weights: unknown task {wanted!r}; the recipe's tasks are {known}.")
    return measure(loaded.model, loaded.tokenizer, named[0], prompt, rows)


def _scored_tasks(loaded: Loaded, wanted: str | Tensor | OfTask | None) -> list[Task]:
    """The tasks on which the cost is measured: the one that the weights are for, or all."""
    tested = [task for task in loaded.tasks if task.test]
    return [task for task in tested if task.name == wanted] or tested


def _convert(
    source: Source, fixed: StaticWeights | None, task: str | None
) -> tuple[dict[str, Tensor] | None, Any]:
    """The LoRA's state dict and configuration; no state dict if the files can be copied."""
    if source.kind == "LORA":
        return None, source.config
    if source.kind == "FACTOREDLORA":
        return factored_to_lora(source.tensors, source.config)
    return multi_to_lora(source.tensors, source.config, None if fixed is None else fixed.weights, task)
