"""From a recipe to its tasks: read, filter, check, draw, split."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from braidlora.config import DataSource, RunConfig, TaskSection
from braidlora.errors import ConfigError, DataError
from braidlora.tasks._task import PARTS, Counts, Part, Row, Task
from braidlora.tasks.read import RawRow, read_rows
from braidlora.tasks.rows import BadRow, column_text, matches, to_row
from braidlora.tasks.templates import Template, get_template

GENERATED = "generated:"
_TRAIN_ROWS, _TEST_ROWS = 300, 100  # of a generated task without `limit`
_REASONS = 5  # how many bad rows are quoted in the counts


def load_tasks(config: RunConfig, kept_columns: Mapping[str, str] | None = None) -> list[Task]:
    """Every task of the recipe with its training, validation and test rows.

    The same recipe gives the same rows: `limit` draws training rows with the recipe's seed. All that decides what is
    validated and tested on goes by `split.seed` (the split, `limit` of these parts, generated suites), so runs that
    differ in `seed` alone are scored on the same rows, except on test rows that the split cuts from a limited `train`.

    Args:
        config: the recipe.
        kept_columns: by task, a column of its source that its rows keep as a further field, `column`.

    Raises:
        ConfigError: a template or a setting does not fit the tasks.
        DataError: a source or a row is not usable (`file:line`), or a task has no rows.
    """
    _check_settings(config)
    cache: dict[tuple[Any, ...], list[RawRow]] = {}

    def raw_rows(source: DataSource, part: Part) -> list[RawRow]:
        key = (source.source, source.format, source.subset, source.split or part)
        if key not in cache:
            cache[key] = list(read_rows(source, part))
        return cache[key]

    kept = kept_columns or {}
    return [_load(section, config, raw_rows, kept.get(section.name)) for section in config.tasks]


def _check_settings(config: RunConfig) -> None:
    if config.kind == "classify":
        for setting in ("packing", "train_on_prompt"):
            if getattr(config.prompt, setting):
                raise ConfigError(
                    f"prompt.{setting}: has no meaning for `classify` tasks, which have no answer tokens; remove it."
                )
        for section in config.tasks:
            if section.extract != "none":
                raise ConfigError(
                    f"tasks.{section.name}.extract: has no meaning for a `classify` task, whose answer is a label; "
                    "remove it."
                )
    for section in config.tasks:
        if section.options is not None and len(set(section.options)) != len(section.options):
            raise ConfigError(f"tasks.{section.name}.options: an option is given twice.")


def _load(
    section: TaskSection,
    config: RunConfig,
    raw_rows: Callable[[DataSource, Part], list[RawRow]],
    kept_column: str | None,
) -> Task:
    template = get_template(section.template or config.prompt.template, section.kind)
    sources: dict[Part, DataSource | None] = {
        "train": section.train,
        "validation": section.validation,
        "test": section.test,
    }
    if _is_generated(section.train) and section.test is None:
        # A generated task brings its own test rows.
        sources["test"] = DataSource(source=section.train.source)
    rows: dict[Part, list[Row]] = {part: [] for part in PARTS}
    counts = {part: Counts() for part in PARTS}
    labels: set[str] = set()
    made = _generate(section.name, sources, config)
    for part, source in sources.items():
        if source is None:
            continue
        if _is_generated(source):
            rows[part] = [_complete(row) for row in (made.train if part == "train" else made.test)]
            counts[part].read = len(rows[part])
            continue
        rows[part] = _read_part(
            raw_rows(source, part), source, section, config, part, counts[part], kept_column
        )
        # Before `limit`: a label is known though none of its rows was drawn.
        labels.update(row["label"] for row in rows[part] if section.kind == "classify")
        if source.limit is not None and source.limit < len(rows[part]):
            counts[part].not_drawn = len(rows[part]) - source.limit
            seed = config.seed if part == "train" else config.split.seed
            rows[part] = _draw(rows[part], source.limit, f"{seed}/{section.name}/{part}")
    _split(section.name, rows, counts, config, sources)
    for part in PARTS:
        counts[part].kept = len(rows[part])
    if section.kind == "generate":
        _warn_of_lost_inputs(section, template, rows["train"])
    options = section.options
    if options is None and made is not None and made.options is not None:
        options = list(made.options)
    accuracy = section.kind == "classify" or section.extract != "none"
    default = made.metric if made is not None else "accuracy" if accuracy else "exact_match"
    return Task(
        name=section.name,
        kind=section.kind,
        template=template,
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        metric=section.metric or default,
        extract=section.extract,
        options=options,
        max_new_tokens=section.max_new_tokens,
        labels=(section.options or sorted(labels)) if section.kind == "classify" else None,
        counts=counts,
    )


def _read_part(
    raws: list[RawRow],
    source: DataSource,
    section: TaskSection,
    config: RunConfig,
    part: Part,
    counts: Counts,
    kept_column: str | None,
) -> list[Row]:
    rows = []
    for raw in raws:
        counts.read += 1
        if raw.problem is None and not matches(raw.columns, source.where):
            counts.filtered += 1
            continue
        try:
            row = to_row(raw, section, part)
            if kept_column is not None:
                row["column"] = column_text(raw, kept_column)
            rows.append(row)
        except BadRow as problem:
            message = f"{raw.place}: {problem}"
            if config.prompt.bad_rows == "stop":
                raise DataError(
                    f"{message} (task {section.name}, {part}). Mend the row, or set prompt.bad_rows=skip to leave "
                    "such rows out and count them."
                ) from None
            counts.skipped += 1
            if len(counts.problems) < _REASONS:
                counts.problems.append(message)
    if not rows:
        raise DataError(_empty(raws, source, section.name, part, counts))
    return rows


def _empty(raws: list[RawRow], source: DataSource, task: str, part: Part, counts: Counts) -> str:
    start = f"task {task}, {part}: no rows"
    if not raws:
        return f"{start}: {source.source} holds none."
    if counts.filtered and not counts.skipped:
        known = []
        for column in source.where:
            values = sorted({str(raw.columns[column]) for raw in raws if column in raw.columns})
            columns = sorted({str(name) for raw in raws[:100] for name in raw.columns})
            known.append(
                f"the known values of {column!r} are {', '.join(values[:20])}{', …' if len(values) > 20 else ''}"
                if values
                else f"there is no column {column!r} (there are {', '.join(columns)})"
            )
        return (
            f"{start}: none of the {len(raws)} rows of {source.source} fits where={source.where}; "
            f"{'; '.join(known)}."
        )
    return (
        f"{start}: of {len(raws)} rows of {source.source}, {counts.filtered} were filtered and {counts.skipped} were "
        f"bad. The first: {counts.problems[0]}."
    )


def _draw(rows: list[Row], limit: int, seed: str) -> list[Row]:
    # The first `limit` of one shuffled order, so that a larger limit keeps the rows of a smaller one.
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[index] for index in sorted(order[:limit])]


def _split(
    task: str,
    rows: dict[Part, list[Row]],
    counts: dict[Part, Counts],
    config: RunConfig,
    sources: dict[Part, DataSource | None],
) -> None:
    """Cut validation and test rows from the training rows where the task gives none of its own.

    Rows with the same prompt go together, so no prompt stands on both sides.
    """
    ratios: dict[Part, float] = {"validation": config.split.validation, "test": config.split.test}
    wanted = [part for part, ratio in ratios.items() if ratio and sources[part] is None]
    if not wanted or not rows["train"]:
        return
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows["train"]):
        groups.setdefault(prompt_key(row), []).append(index)
    if len(groups) <= len(wanted):
        raise DataError(
            f"task {task}: {len(rows['train'])} rows with {len(groups)} different prompts cannot be split into train "
            f"and {' and '.join(wanted)}, for no prompt may stand on two sides. Give the task rows of its own, or "
            "set the ratio of `split` to 0."
        )
    order = list(groups.values())
    random.Random(f"split/{config.split.seed}").shuffle(order)
    taken: set[int] = set()
    for reserved, part in zip(range(len(wanted), 0, -1), wanted, strict=True):
        # `reserved` groups stay for the training rows and the parts that are cut later.
        count = max(1, round(ratios[part] * len(rows["train"])))
        cut: list[int] = []
        while len(cut) < count and len(order) > reserved:
            cut += order.pop()
        taken.update(cut)
        rows[part] = [rows["train"][index] for index in sorted(cut)]
        counts[part].read = len(cut)
    counts["train"].cut = len(taken)
    rows["train"] = [row for index, row in enumerate(rows["train"]) if index not in taken]


def prompt_key(row: Row) -> tuple[str, ...]:
    """What makes two rows the same question: the text, or instruction and input."""
    return (row["text"],) if "text" in row else (row["instruction"], row["input"])


def _is_generated(source: DataSource | None) -> TypeGuard[DataSource]:
    return source is not None and source.source.startswith(GENERATED)


def _generate(task: str, sources: dict[Part, DataSource | None], config: RunConfig) -> Any:
    """The generated task behind `generated:NAME`, or None; `limit` is how many rows of a part are made.

    Training and test rows are made in one go, for the generator keeps the two apart.
    """
    generated = {part: source for part, source in sources.items() if _is_generated(source)}
    if not generated:
        return None
    from braidlora.tasks.generated import generate_suite

    for part, source in generated.items():
        if part == "validation":
            raise ConfigError(
                f"tasks.{task}.validation: a generated task has training and test rows only; use split.validation."
            )
        if source.where or source.split or source.subset or source.format:
            raise ConfigError(
                f"tasks.{task}.{part}: {source.source} has no columns, splits or format; only `limit` applies."
            )
    names = {source.source.removeprefix(GENERATED) for source in generated.values()}
    if len(names) > 1:
        raise ConfigError(
            f"tasks.{task}: trains on one generated task and tests on another ({', '.join(sorted(names))}); give each "
            "a task of its own."
        )
    train, test = generated.get("train"), generated.get("test")
    name = names.pop()
    return generate_suite(
        config.split.seed,
        train_rows=_TRAIN_ROWS if train is None or train.limit is None else train.limit,
        test_rows=_TEST_ROWS if test is None or test.limit is None else test.limit,
        tasks=[name],
    )[name]


def _complete(row: Row) -> Row:
    return {"input": "", "answer": row["output"], **row}


def _warn_of_lost_inputs(section: TaskSection, template: Template, rows: list[Row]) -> None:
    with_input = sum(1 for row in rows if row["input"])
    if with_input and not template.uses_input:
        warnings.warn(
            f"task {section.name}: {with_input} training rows have an `input`, which the template never shows; add "
            "{input} to it.",
            stacklevel=4,
        )
