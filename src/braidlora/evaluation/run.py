"""Evaluation of a model, or of a run, adapter or base on disk, on the test rows of its tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from braidlora import __version__
from braidlora.adapters import MultiLoraConfig
from braidlora.config import RunConfig
from braidlora.errors import ConfigError, DataError, explain_write_failures
from braidlora.evaluation.digest import digest_json, model_digests
from braidlora.evaluation.extraction import closed_answers
from braidlora.evaluation.predictions import PredictionFile
from braidlora.evaluation.questions import Questions, encoded_options, longest_prompt, mode_of
from braidlora.evaluation.results import (
    refuse_foreign_files,
    results_directory,
    training_record,
    write_results,
)
from braidlora.evaluation.scoring import majority_scores, record, references, summarize, task_metrics
from braidlora.models.loading import Found, find
from braidlora.runs import (
    MANIFEST,
    METRICS,
    PREDICTIONS,
    hold,
    quoted,
    refuse_links,
    remove_leftovers,
    uncover,
)
from braidlora.tasks import LabelSpace, Task, written_answers
from braidlora.tasks.checks import check_positive
from braidlora.tasks.options import answers_of


def evaluate(
    target: str | Path,
    config: RunConfig | None = None,
    *,
    overrides: Sequence[str] = (),
    directory: Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a run, an adapter or a base model on the test rows, and write predictions and `metrics.json`.

    Args:
        target: a run directory, an adapter folder in PEFT's format, or a base model (folder, hub name, `embedded`).
        config: the recipe; a run directory has its own.
        overrides: `dotted.key=value` for the target's own recipe.
        directory: where the results go; by default see `results.results_directory`.
        resume: keep predictions that the same model made on the same data; False answers every row again.
        progress: show a progress bar on stderr.

    Returns:
        the content of `metrics.json`.

    Raises:
        ConfigError: a recipe is missing or does not fit the target, or the results folder is a link.
        DataError: no task has test rows.
        CheckpointError: the adapter is damaged, pickled, or made for another base; its misfitting keys are listed.
        TrainingError: the model gives NaN, memory runs out, or the results cannot be written.
    """
    found = find(target, config, overrides)
    own = results_directory(found)
    directory = directory or own
    if directory.is_symlink():
        raise ConfigError(f"{directory}: is a link; give --directory the folder itself.")
    refuse_links(directory, (PREDICTIONS, METRICS, MANIFEST))
    if directory != own:
        refuse_foreign_files(directory)
    with hold(directory, instead="choose another folder with --directory=PATH"):
        return _evaluate(found, directory, resume, progress)


def _evaluate(found: Found, directory: Path, resume: bool, progress: bool) -> dict[str, Any]:
    # What training recorded stays in the run's own results.
    kept = training_record(found.run) if found.run is not None and directory == found.run.path else {}
    loaded = found.load()
    if not any(task.test for task in loaded.tasks):
        names = ", ".join(task.name for task in loaded.tasks)
        raise DataError(
            f"no test rows in any task ({names}): give `test` in the tasks, or hold some out with --split.test=0.1."
        )
    then = "and start again (finished rows are kept), or give another --directory"
    with explain_write_failures(directory, then):
        remove_leftovers(directory)
        remove_leftovers(directory / PREDICTIONS)
        directory.mkdir(parents=True, exist_ok=True)
        metrics = evaluate_tasks(
            loaded.model,
            loaded.tokenizer,
            loaded.tasks,
            loaded.config,
            directory,
            label_space=loaded.label_space,
            resume=resume,
            progress=progress,
        )
        metrics["majority"] = majority_scores(loaded.tasks)
        metrics.update(kept)
        write_results(directory, metrics)
    return metrics


def evaluate_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    config: RunConfig,
    directory: Path,
    label_space: LabelSpace | None = None,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer and score every test row of `tasks` with `model`, on its device and in evaluation mode.

    Predictions go to `directory/predictions/TASK.jsonl` as they are made. Unless `resume` is False, rows that the same
    model (adapter and base) answered there before, with the same prompts and settings, are not answered again.

    Args:
        model: a causal language model, or a sequence classifier for `classify` tasks; with or without a PEFT adapter,
            which may be disabled.
        tokenizer: its tokenizer, with a padding token.
        tasks: those without test rows are skipped and listed under `without_test_rows`.
        config: its `evaluation` and `prompt` sections are read.
        directory: usually a run directory.
        label_space: the classifier's labels; by default those of `tasks`.
        resume: continue where an earlier evaluation stopped.
        progress: show a progress bar on stderr.

    Returns:
        `{"tasks": {name: {"metric", "score", "n"}}, "mean", "worst", "worst_task", "std", "delta_m", …}` as in
        `scoring.summarize`; scores run from 0 to 100.

    Raises:
        ConfigError: `rank` and a task without options, or answers longer than the model's positions.
        DataError: a reference contains no answer under the task's extraction rule, or a label that the model lacks.
        TrainingError: the model gives NaN, or memory runs out.
    """
    tasks = [written_answers(task, tokenizer) for task in tasks]
    scored = [task for task in tasks if task.test]
    check_evaluation(model, tokenizer, tasks, config)
    _refuse_unknown_tasks(model, scored)
    if label_space is None and config.kind == "classify":
        label_space = LabelSpace.of(tasks)
    if label_space is not None:
        _refuse_another_head(model, label_space)
    expected = {task.name: references(task) for task in scored}
    questions = {task.name: Questions(task, model, tokenizer, config, label_space) for task in scored}
    made_by = {"braidlora": __version__, **(model_digests(model) if scored else {})}
    metrics = {}
    total = sum(len(task.test) for task in scored)
    uncover(directory, f"{PREDICTIONS}/")  # until they are complete again
    with tqdm(total=total, desc="evaluate", unit="row", disable=not progress, leave=False) as bar:
        for task in scored:
            task_questions = questions[task.name]
            source = {**made_by, **task_questions.digests(), "data": digest_json(task.test)}
            file = PredictionFile(directory / PREDICTIONS, task.name, source, len(task.test), resume=resume)
            prompts = [task.template.prompt(row, tokenizer, evaluation=True) for row in task.test]

            def remade(
                old: dict[str, Any], task: Task = task, prompts: list[str] = prompts
            ) -> dict[str, Any]:
                index = old["index"]
                return record(task, index, prompts[index], expected[task.name][index], old["prediction"])

            file.review(remade)
            missing = file.missing
            bar.update(len(task.test) - len(missing))
            bar.set_postfix_str(task.name)
            with closing(task_questions.answers(missing)) as answers:
                for index, answer in answers:
                    file.append(record(task, index, prompts[index], expected[task.name][index], answer))
                    bar.update()
            metrics[task.name] = task_metrics(task, file.finish())
    left_out = [task.name for task in tasks if not task.test]
    return summarize(metrics, config.evaluation.references, left_out)


def check_evaluation(
    model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], config: RunConfig
) -> None:
    """Raise what `evaluate_tasks` would raise about these settings and rows, before hours of training.

    Args:
        model: the base model suffices; only its configuration is read.
        tokenizer: its tokenizer.
        tasks: as for `evaluate_tasks`.
        config: the recipe.

    Raises:
        ConfigError, DataError: as `evaluate_tasks`.
    """
    scored = [written_answers(task, tokenizer) for task in tasks if task.test]
    _refuse_rank_without_options(scored, config)
    for task in scored:
        references(task)
        if task.kind == "generate":
            check_positive(task, task.options or closed_answers(task.extract))
            for row in task.test if task.template.chat else ():
                task.template.prompt(row, tokenizer, evaluation=True)
            ranks = mode_of(task, config.evaluation) == "rank"
            options = encoded_options(task, tokenizer) if ranks else []
            longest_prompt(task, model, config, options)


_MOST_OPTIONS = 10  # that a message proposes


def _refuse_rank_without_options(tasks: Sequence[Task], config: RunConfig) -> None:
    without = [
        task for task in tasks if mode_of(task, config.evaluation) == "rank" and len(task.options or []) < 2
    ]
    if not without:
        return
    names, first = ", ".join(task.name for task in without), without[0]
    found = list(dict.fromkeys(answers_of(row)[0] for row in first.train))
    listed = f"[{', '.join(map(json.dumps, found))}]" if 2 <= len(found) <= _MOST_OPTIONS else "[...]"
    key = f"tasks.{first.name}.mode" if first.mode == "rank" else "evaluation.mode"
    raise ConfigError(
        f"{key}: `rank` chooses among a task's options, but {names} has none. Give it `options: {listed}`, or "
        f"generate answers with tasks.{first.name}.mode=generate."
    )


def _refuse_unknown_tasks(model: Any, tasks: Sequence[Task]) -> None:
    """An adapter that weights its experts by task has no weights for others."""
    adapter = getattr(model, "peft_config", {}).get("default")
    if not isinstance(adapter, MultiLoraConfig) or not adapter.by_task:
        return
    known = adapter.task_names or []
    if unknown := [task.name for task in tasks if task.name not in known]:
        raise ConfigError(
            f"tasks: the adapter weights its experts by task, and was not trained on {', '.join(unknown)}; its tasks "
            f"are {', '.join(known)}. Score only these, or train with adapter.gate=token."
        )


def _refuse_another_head(model: Any, label_space: LabelSpace) -> None:
    """Compare with the labels in the model's configuration, unless these are LABEL_0 and so on."""
    id2label = model.config.id2label
    named = [str(id2label[index]) for index in sorted(id2label)]
    if named != [f"LABEL_{index}" for index in range(len(named))] and named != label_space.names:
        raise ConfigError(
            f"the model's logits are {quoted(named)}, in this order, but the label space is "
            f"{quoted(label_space.names)}. Give the `label_space` that the model was trained with."
        )
