"""What is probably wrong with the rows of the tasks, found before training: warnings, or errors.

Rows: labels that training never sees, an answer column that holds no labels, a metric that cannot fit, settings without
effect. Encoded rows: a cutoff that drops or cuts many of them.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from braidlora.answers import plain_answer
from braidlora.config import RunConfig
from braidlora.errors import ConfigError, DataError, DataWarning
from braidlora.runs import quoted
from braidlora.tasks._task import Part, Row, Task
from braidlora.tasks.dataset import MultiTaskDataset
from braidlora.tasks.encode import prompt_lengths
from braidlora.tasks.options import answers_of

_MANY_LABELS = 20  # with at least as many, most of them one-off, a column is not a label
_FEW_ANSWERS, _ROWS_PER_ANSWER = 20, 5  # so few answers, each in so many rows, are labels
_LONG_ANSWER = 20  # words; no model repeats so many exactly
_SHARE = 0.25  # of the rows
_CHECKED = 1000  # test rows of a task whose prompts are encoded


def warn_of_rows(tasks: Sequence[Task], config: RunConfig, *, whole: bool = True) -> list[str]:
    """Warn of what is probably wrong with the rows; returns the warnings.

    Args:
        tasks: with their rows.
        config: the recipe.
        whole: whether these are the rows of all tasks; else settings that others may use are not checked.

    Raises:
        ConfigError: a task's `positive` is none of its labels.
        DataError: the labels of a task are not labels, or no test row has a label of the training rows.
    """
    found: list[str] = list(_without_effect(tasks, config)) if whole else []
    everywhere = {label for task in tasks for label in _labels(task.train)} if _classifies(tasks) else set()
    for task in tasks:
        _refuse_one_off_labels(task)
        if whole:  # one site of several may have no row of that label
            check_positive(task, task.labels or task.options)
        found += _unseen_labels(task, everywhere)
        found += _unfit_metric(task)
    return _warned(found)


def check_positive(task: Task, labels: Sequence[str] | None) -> None:
    """Raise ConfigError if a task's `positive` is none of its labels: its F1 would be 0, whatever is predicted.

    Args:
        labels: all answers that can count; None where they are not known.
    """
    if task.positive is None or labels is None or plain_answer(task.positive) in map(plain_answer, labels):
        return
    near = [
        label for label in labels if plain_answer(label).casefold() == plain_answer(task.positive).casefold()
    ]
    meant = f" Write {near[0]!r}, in the same case." if near else ""
    raise ConfigError(
        f"tasks.{task.name}.positive: {task.positive!r} is not one of the task's labels {quoted(labels)}.{meant}"
    )


def warn_of_lengths(datasets: Mapping[Part, MultiTaskDataset], config: RunConfig) -> list[str]:
    """Warn where `prompt.cutoff` drops or cuts a quarter of a task's rows, or leaves almost no prompt."""
    found: list[str] = []
    for part in ("train", "validation"):
        if part in datasets:
            for task in datasets[part].task_names:
                found += _short_cutoff(datasets[part], task, part, config.prompt.cutoff)
    return _warned(found)


def warn_of_prompts(tasks: Sequence[Task], tokenizer: Any, config: RunConfig) -> list[str]:
    """As `warn_of_lengths`, of the prompts of test rows (the first thousand of each task).

    Test rows that `split` takes from the training rows are as long as these, which `warn_of_lengths` counts.
    """
    found: list[str] = []
    cutoff = config.prompt.cutoff
    for task in tasks:
        counts = task.counts.get("test")
        rows = [] if counts is not None and counts.held_out else task.test[:_CHECKED]
        lengths = sorted(prompt_lengths(rows, task.template, tokenizer))
        long = sum(length > cutoff for length in lengths)
        if rows and long >= _SHARE * len(rows):
            most = lengths[math.ceil(0.95 * len(lengths)) - 1]
            found.append(
                f"task {task.name}, test: prompt.cutoff={cutoff} is too short for the prompts of its "
                f"{len(rows)} rows: {long} cut. {most} tokens fit 95% of them, {lengths[-1]} all."
            )
    return _warned(found)


def _warned(found: list[str]) -> list[str]:
    for text in found:
        warnings.warn(text, DataWarning, stacklevel=3)
    return found


def _classifies(tasks: Sequence[Task]) -> bool:
    return any(task.kind == "classify" for task in tasks)


def _labels(rows: Sequence[Row]) -> list[str]:
    return [row["label"] for row in rows if "label" in row]


def _refuse_one_off_labels(task: Task) -> None:
    labels = Counter(_labels(task.train))
    if task.kind != "classify" or task.options is not None or len(labels) < _MANY_LABELS:
        return
    once = [label for label, count in labels.items() if count == 1]
    if len(once) > len(labels) / 2:
        raise DataError(
            f"task {task.name}: its {len(task.train)} training rows have {len(labels)} different labels, "
            f"{len(once)} of them only once, such as {quoted([_short(one) for one in once[:3]])}. That column holds "
            "answers rather than labels: name another one in columns.label, or make it a `generate` task. If these "
            "are the labels, list them in `options`."
        )


def _unseen_labels(task: Task, everywhere: set[str]) -> Iterator[str]:
    """Test rows with a label that no training row has."""
    if task.kind == "classify":
        trained = set(_labels(task.train)) or everywhere
        given: list[list[str]] = [[label] for label in _labels(task.test)]
    else:
        trained = _trained_answers(task)
        given = [[plain_answer(answer) for answer in answers_of(row)] for row in task.test]
    if not trained or not given:
        return
    unseen = Counter(answers[0] for answers in given if not trained.intersection(answers))
    if not unseen:
        return
    count, kind = unseen.total(), "a label" if task.kind == "classify" else "an answer"
    listed = ", ".join(f"{_short(label)!r} ({number})" for label, number in unseen.most_common(3))
    more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
    known = quoted(sorted(trained), most=8)
    drawn = task.counts.get("train")
    all_of_them = drawn is None or not drawn.not_drawn
    if (
        count == len(given)
        and task.kind == "classify"
        and task.options is None
        and task.train
        and all_of_them
    ):
        raise DataError(
            f"task {task.name}: no test row has {kind} that training sees. Test: {listed}{more}; training: {known}. "
            "Make the labels of both parts the same."
        )
    yield (
        f"task {task.name}: {count} of {len(given)} test rows have {kind} that no training row has: {listed}{more}; "
        f"they will almost certainly be wrong. {_remedy(task, list(unseen), trained)}"
    )


def _remedy(task: Task, unseen: Sequence[str], trained: set[str]) -> str:
    folded = {one.casefold().strip(): one for one in sorted(trained)}
    if same := next(((one, folded[one.casefold()]) for one in unseen if one.casefold() in folded), None):
        return f"Is {same[0]!r} the same as {same[1]!r}? Then give both the same spelling."
    counts = task.counts.get("train")
    if counts is not None and counts.not_drawn:
        return (
            f"`limit` draws {counts.kept} of {counts.kept + counts.not_drawn + counts.cut} training rows of this "
            "task; draw more."
        )
    return "Add training rows with it, or leave these test rows out with `where`."


def _trained_answers(task: Task) -> set[str]:
    """The answers in the training rows of a `generate` task whose answers are labels; otherwise none."""
    if not task.train:
        return set()
    answers = Counter(plain_answer(answer) for row in task.train for answer in answers_of(row))
    few = len(answers) <= _FEW_ANSWERS and len(task.train) >= _ROWS_PER_ANSWER * len(answers)
    return set(answers) if few or task.options is not None else set()


def _unfit_metric(task: Task) -> Iterator[str]:
    if task.kind == "classify" or task.metric not in ("exact_match", "accuracy") or not task.test:
        return
    if task.extract != "none" or task.options is not None:
        return
    answers = [answers_of(row)[0] for row in task.test]
    words = statistics.median(len(answer.split()) for answer in answers)
    if words > _LONG_ANSWER and len(set(answers)) > len(answers) / 2:
        yield (
            f"task {task.name}: metric {task.metric} counts answers that are the same word for word, and these have "
            f"{words:g} words: scores will be near 0. Use rougeL."
        )


def _without_effect(tasks: Sequence[Task], config: RunConfig) -> Iterator[str]:
    """Settings that this recipe's tasks do not use."""
    evaluation, training, mixing = config.evaluation, config.training, config.mixing
    modes = {task.mode or evaluation.mode for task in tasks if task.kind == "generate"}
    for key, used in (
        ("num_beams", "generate"),
        ("max_new_tokens", "generate"),
        ("length_normalized", "rank"),
    ):
        if evaluation.is_given(key) and used not in modes:
            yield f"evaluation.{key}: has no effect, because no task is answered by `{used}`."
    for task in tasks:
        if task.kind == "generate" and (task.mode or evaluation.mode) == "rank" and task.max_new_tokens:
            yield f"task {task.name}: max_new_tokens has no effect with `rank`, which writes no text."
    if mixing.is_given("temperature") and mixing.strategy != "temperature":
        yield f"mixing.temperature: has no effect with mixing.strategy: {mixing.strategy}; set that to temperature."
    if training.is_given("warmup_steps") and training.warmup_steps and training.scheduler == "constant":
        yield (
            "training.warmup_steps: has no effect with training.scheduler: constant; set that to constant_with_warmup."
        )
    if training.eval_steps and not any(task.validation for task in tasks):
        yield (
            "training.eval_steps: has no effect, because no task has validation rows; hold some out with "
            "split.validation=0.1."
        )
    unscored = [name for name in evaluation.references if not any(t.test for t in tasks if t.name == name)]
    if unscored:
        yield (
            f"evaluation.references: {', '.join(unscored)} has no test rows, so its reference has no effect."
        )


def _short_cutoff(dataset: MultiTaskDataset, task: str, part: Part, cutoff: int) -> Iterator[str]:
    counts = dataset.counts[task]
    rows = counts.rows + counts.dropped
    if not rows:
        return
    problems = []
    if counts.dropped >= _SHARE * rows:
        problems.append(f"{counts.dropped} dropped (the answer alone is too long)")
    if counts.truncated >= _SHARE * rows:
        problems.append(f"{counts.truncated} cut")
    if counts.no_prompt >= _SHARE * rows:
        problems.append(f"{counts.no_prompt} with almost nothing left of the prompt")
    if problems:
        yield (
            f"task {task}, {part}: prompt.cutoff={cutoff} is too short for its {rows} rows: {', '.join(problems)}. "
            f"{counts.fits_most} tokens fit 95% of {'the others' if counts.dropped else 'them'}, {counts.fits_all} all."
        )


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
