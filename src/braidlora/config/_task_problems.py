"""What is wrong with a task of a recipe, or would have no effect: metrics, modes, sources; `data` as a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from braidlora import catalog
from braidlora.errors import ConfigError

if TYPE_CHECKING:
    from braidlora.config._data_source import DataSource
    from braidlora.config._schema import RunConfig, TaskSection

PARTS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")  # parts that `split` can take from `train`
GENERATED = "generated:"
_OPEN = ("none", "number")  # extractors whose answers are not a closed set
_F1 = ("macro_f1", "f1")


def with_catalog_sources(task: dict[str, Any]) -> dict[str, Any]:
    """A task as in YAML whose `data` is the source of each part that the dataset has and that gives none itself.

    Raises:
        ValueError: there is no such dataset, or a part names another one.
    """
    key = task["data"]
    source = f"{catalog.PREFIX}{key}"
    filled = dict(task)
    try:
        parts = catalog.parts(key)
    except ConfigError as error:
        raise ValueError(f"data: {str(error).removesuffix('.')}") from None
    for part in parts:
        given = task.get(part, {})
        if isinstance(given, dict) and not given.get("source"):
            filled[part] = {**given, "source": source}
        other = given.get("source") if isinstance(given, dict) else given
        if isinstance(other, str) and other.startswith(catalog.PREFIX) and other != source:
            raise ValueError(
                f"`data` is {key}, but the source of `{part}` is {other}; change or remove one of them"
            )
    return filled


def task_problems(task: TaskSection) -> list[str]:
    """What one task says that cannot be, or would have no effect."""
    if task.train is None and task.test is None:
        return ["has neither rows to train nor to test on; give `train`, `test`, or both"]
    return [
        *_source_problems(task),
        *_columns_used_twice(task),
        *(_of_classifier(task) if task.kind == "classify" else _of_language_model(task)),
        *_f1_problems(task),
    ]


def recipe_problems(config: RunConfig) -> list[str]:
    """What the tasks and the sections of a recipe say that would have no effect."""
    problems = [one for task in config.tasks for one in _limits_without_rows(task, config)]
    if config.kind == "classify" and config.evaluation.mode != "generate":
        problems.append(
            f"evaluation.mode: {config.evaluation.mode} has no effect: `classify` tasks are answered by their head; "
            "remove it, or make them `generate` tasks"
        )
    return problems


def _source_problems(task: TaskSection) -> Iterator[str]:
    for part in PARTS:
        source: DataSource | None = getattr(task, part)
        if source is None or source.source:
            continue
        extra = [key for key in type(source).model_fields if key != "limit" and source.is_given(key)]
        if part == "train" or source.limit is None:
            yield f"{part}.source: required, but missing"
        elif extra:
            yield f"{part}.{extra[0]}: applies to a source, and `{part}` has none"


def _columns_used_twice(task: TaskSection) -> Iterator[str]:
    fields: dict[str, list[str]] = {}
    for field, column in task.columns.items():
        fields.setdefault(column, []).append(field)
    for column, both in fields.items():
        if len(both) > 1 and set(both) != {"output", "answer"}:  # the reference may well be the output
            yield (
                f"columns: {' and '.join(f'`{field}`' for field in both)} are both read from the column {column!r}; "
                "name another column for one of them, or remove it"
            )


def _limits_without_rows(task: TaskSection, config: RunConfig) -> Iterator[str]:
    for part in HELD_OUT:
        source: DataSource | None = getattr(task, part)
        if source is not None and not source.source and not holds_out(task, part, config):
            yield (
                f"tasks.{task.name}.{part}.limit: has no effect, because the task has no `{part}` rows: give "
                f"`{part}` a source, or hold rows out with split.{part}=0.1"
            )


def holds_out(task: TaskSection, part: str, config: RunConfig) -> bool:
    """Whether a task without a source for this part has such rows all the same."""
    if task.train is None:
        return False
    if part == "test" and task.train.source.startswith(GENERATED):
        return True
    return bool(getattr(config.split, part))


def _of_classifier(task: TaskSection) -> Iterator[str]:
    if task.metric is not None and task.metric.startswith("rouge"):
        yield (
            f"metric: {task.metric} compares texts word by word, and a `classify` task predicts a label; use accuracy, "
            "macro_f1 or f1"
        )
    if task.mode is not None:
        yield f"mode: {task.mode} has no effect: a `classify` task is answered by its head; remove it"
    if task.max_new_tokens is not None:
        yield "max_new_tokens: has no effect: a `classify` task writes no text; remove it"
    if isinstance(task.class_weights, dict) and task.options is not None:
        yield from _unknown("class_weights", list(task.class_weights), task.options)


def _of_language_model(task: TaskSection) -> Iterator[str]:
    if task.class_weights is not None:
        yield (
            "class_weights: weighs the loss of a `classify` task, and this is a `generate` task; remove it, or draw "
            "tasks and rows evenly with `mixing`"
        )
    if task.metric in _F1 and task.options is None and task.extract in _OPEN:
        yield (
            f"metric: {task.metric} needs a set of labels, and this task's answers are free text; list them in "
            "`options`, or use exact_match or rougeL"
        )


def _f1_problems(task: TaskSection) -> Iterator[str]:
    if task.metric == "f1" and task.positive is None:
        yield (
            "positive: missing; `f1` is the F1 of one label. Name it (`positive: LABEL`), or use macro_f1, the mean "
            "over all labels"
        )
    if task.positive is not None and task.metric != "f1":
        yield f"positive: has no effect with metric: {task.metric or 'accuracy'}; use f1, or remove it"
    if task.positive is not None and task.options is not None:
        yield from _unknown("positive", [task.positive], task.options)


def _unknown(key: str, labels: list[str], options: list[str]) -> Iterator[str]:
    if unknown := [label for label in labels if label not in options]:
        yield f"{key}: {', '.join(map(repr, unknown))} is not one of the options {', '.join(map(repr, options))}"
