"""Load the tasks of a recipe: read, filter, check, draw and split their rows."""

from __future__ import annotations

import functools
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from braidlora import catalog
from braidlora.config import DataSource, PromptSection, RunConfig, TaskSection
from braidlora.errors import ConfigError, DataError
from braidlora.tasks._task import PARTS, Counts, Part, Row, Task
from braidlora.tasks.read import describe, read_rows
from braidlora.tasks.select import Selection, select
from braidlora.tasks.templates import Template, get_template

GENERATED = "generated:"
_OF_FILES = ("format", "subset", "delimiter", "encoding", "sheet")
_TRAIN_ROWS, _TEST_ROWS = 300, 100  # rows of a generated task without `limit`


def load_tasks(config: RunConfig, kept_columns: Mapping[str, str] | None = None) -> list[Task]:
    """Every task of the recipe with its training, validation and test rows.

    The same recipe gives the same rows. `limit` draws training rows with the recipe's `seed`. Validation and test rows
    depend on `split.seed` (the split, `limit` of these parts, generated tasks), so runs that differ only in `seed` are
    scored on the same rows, except for test rows that the split takes from a limited `train`.

    Args:
        config: the recipe.
        kept_columns: by task name, a column of the source that the rows keep as an additional field, `column`.

    Raises:
        ConfigError: a template or a setting does not fit the tasks.
        DataError: a source or a row (`file:line`) is unusable, or a task has no rows.
    """
    _check_settings(config)
    kept = kept_columns or {}
    plans = [_Plan(section, config, kept.get(section.name)) for section in config.tasks]
    # A source is read once for all tasks that have rows in it.
    by_source: dict[tuple[Any, ...], list[Selection]] = {}
    for plan in plans:
        for part, selection in plan.selections.items():
            source = selection.source
            written = (source.format, source.delimiter, source.encoding, source.sheet)
            key = (source.source, *written, source.subset, source.split or part)
            by_source.setdefault(key, []).append(selection)
    for selections in by_source.values():
        first = selections[0]
        select(selections, functools.partial(read_rows, first.source, first.part))
    return [plan.task() for plan in plans]


def _check_settings(config: RunConfig) -> None:
    if config.kind == "classify":
        for setting in ("packing", "train_on_prompt"):
            if getattr(config.prompt, setting):
                raise ConfigError(
                    f"prompt.{setting}: `classify` tasks have no answer tokens, so this has no effect; remove it."
                )
        for section in config.tasks:
            if section.extract != "none":
                raise ConfigError(
                    f"tasks.{section.name}.extract: a `classify` task predicts a label, so nothing is extracted; "
                    "remove it."
                )
    for section in config.tasks:
        if section.options is not None and len(set(section.options)) != len(section.options):
            raise ConfigError(f"tasks.{section.name}.options: an option is given twice.")


def check_chat_settings(tasks: Sequence[Task], prompt: PromptSection) -> None:
    """Reject settings for chats where no task is put into a chat template.

    Raises:
        ConfigError: a setting has no effect.
    """
    templates = [task.template.chat for task in tasks]
    chats = any("messages" in row for task in tasks for part in PARTS for row in task.rows(part)[:1])
    if prompt.train_on_turns == "last" and not chats:
        raise ConfigError(
            "prompt.train_on_turns: has no effect, because no task's rows are chats (`messages`); remove it."
        )
    if prompt.train_on_turns == "last" and prompt.train_on_prompt:
        raise ConfigError(
            "prompt.train_on_turns: last has no effect with prompt.train_on_prompt=true, which computes the loss on "
            "all tokens; remove one of them."
        )
    if prompt.chat_template_kwargs and not any(templates):
        raise ConfigError(
            "prompt.chat_template_kwargs: has no effect, because no task uses a chat template; remove it, or set "
            "prompt.template=chat."
        )


class _Plan:
    """The sources of one task, and once they are read, the task."""

    def __init__(self, section: TaskSection, config: RunConfig, kept_column: str | None) -> None:
        self.section, self.config = section, config
        self.template = task_template(section, config)
        given: dict[Part, DataSource | None] = {part: getattr(section, part) for part in PARTS}
        # `{limit: N}` without a source limits the rows that a part has without one.
        self.limits = {part: one.limit for part, one in given.items() if one is not None and not one.source}
        self.sources: dict[Part, DataSource | None] = {
            part: None if one is None or not one.source else _resolved(one, part, section.name)
            for part, one in given.items()
        }
        if _is_generated(section.train) and self.sources["test"] is None:
            # A generated task has its own test rows.
            self.sources["test"] = DataSource(source=section.train.source, limit=self.limits.get("test"))
        self.made = _generate(section.name, self.sources, config)
        self.selections = {
            part: Selection(section, part, source, config, kept_column)
            for part, source in self.sources.items()
            if source is not None and not _is_generated(source)
        }

    def task(self) -> Task:
        section, made = self.section, self.made
        rows: dict[Part, list[Row]] = {part: [] for part in PARTS}
        counts = {part: Counts() for part in PARTS}
        labels: set[str] = set()
        for part, source in self.sources.items():
            if part in self.selections:
                selection = self.selections[part]
                rows[part], counts[part] = selection.rows, selection.counts
                labels |= selection.labels
            elif source is not None:
                rows[part] = [_complete(row) for row in (made.train if part == "train" else made.test)]
                counts[part].read = len(rows[part])
        _split(section.name, rows, counts, self.config, self.sources, self.limits)
        for part in PARTS:
            counts[part].kept = len(rows[part])
        for part, selection in self.selections.items():
            counts[part].read_as = describe(selection.source)
        template = self.template
        if section.kind == "generate":
            if _are_chats(section, rows):
                template = _chat_template(section, self.config)
            _warn_of_lost_inputs(section, template, rows["train"])
        options = section.options
        if options is None and made is not None and made.options is not None:
            options = list(made.options)
        accuracy = made is None and (section.kind == "classify" or section.extract != "none")
        return Task(
            name=section.name,
            kind=section.kind,
            template=template,
            train=rows["train"],
            validation=rows["validation"],
            test=rows["test"],
            metric=section.metric or ("accuracy" if accuracy else "exact_match"),
            extract=section.extract,
            options=options,
            max_new_tokens=section.max_new_tokens,
            labels=(section.options or sorted(labels)) if section.kind == "classify" else None,
            mode=section.mode,
            positive=section.positive,
            counts=counts,
        )


def _split(
    task: str,
    rows: dict[Part, list[Row]],
    counts: dict[Part, Counts],
    config: RunConfig,
    sources: dict[Part, DataSource | None],
    limits: Mapping[Part, int | None],
) -> None:
    """Take validation and test rows from the training rows if the task has no sources for them.

    Rows with the same prompt stay together, so that no prompt is in two parts. `limits` is how many of a part's rows
    are kept; the others are not used for training either, so that a limit changes only what is scored.
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
            f"task {task}: {len(rows['train'])} rows with {len(groups)} distinct prompts cannot be split into train "
            f"and {' and '.join(wanted)}, because a prompt may be in one part only. Give the task sources for these "
            "parts, or set the ratios of `split` to 0."
        )
    order = list(groups.values())
    random.Random(f"split/{config.split.seed}").shuffle(order)
    taken: set[int] = set()
    for reserved, part in zip(range(len(wanted), 0, -1), wanted, strict=True):
        # `reserved` groups are left for training and for the parts that follow.
        count = max(1, round(ratios[part] * len(rows["train"])))
        cut: list[int] = []
        while len(cut) < count and len(order) > reserved:
            cut += order.pop()
        taken.update(cut)
        counts[part].read, counts[part].held_out = len(cut), True
        limit = limits.get(part)
        if limit is not None and limit < len(cut):
            counts[part].not_drawn = len(cut) - limit
            random.Random(f"{config.split.seed}/{task}/{part}").shuffle(cut)
            cut = cut[:limit]
        rows[part] = [rows["train"][index] for index in sorted(cut)]
    counts["train"].cut = len(taken)
    rows["train"] = [row for index, row in enumerate(rows["train"]) if index not in taken]


def prompt_key(row: Row) -> tuple[str, ...]:
    """What rows with the same prompt share: the text, instruction and input, or the chat before its last answer."""
    if "messages" in row:
        return (json.dumps([row["messages"][:-1], row.get("tools")], ensure_ascii=False, sort_keys=True),)
    return (row["text"],) if "text" in row else (row["instruction"], row["input"])


def _resolved(source: DataSource, part: Part, task: str) -> DataSource:
    """The file, and the condition on its rows, of a source `data:KEY`; other sources as they are.

    Raises:
        ConfigError: there is no such dataset, it has no such part, or a key does not apply to it.
        DataError: its file is nowhere on this machine and cannot be downloaded.
    """
    if not source.source.startswith(catalog.PREFIX):
        return source
    key, place = source.source.removeprefix(catalog.PREFIX), f"tasks.{task}.{part}"
    if extra := [key for key in _OF_FILES if source.is_given(key)]:
        raise ConfigError(
            f"{place}.{extra[0]}: does not apply to {source.source}, a dataset of the catalog; remove it."
        )
    try:
        found = catalog.data_set(key)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    wanted = source.split or part
    if wanted not in found.parts:
        raise ConfigError(
            f"{place}: {source.source} has no {wanted} rows; it has {' and '.join(found.parts)}. Set `split` to choose "
            "one."
        )
    rows = found.parts[wanted]
    if other := [column for column in rows.where if column in source.where]:
        raise ConfigError(
            f"{place}.where.{other[0]}: {source.source} is the rows with {dict(rows.where)} of a larger file; choose "
            "another key instead."
        )
    path = catalog.find_part(key, rows)
    return DataSource(source=str(path), where={**source.where, **rows.where}, limit=source.limit)


def _is_generated(source: DataSource | None) -> TypeGuard[DataSource]:
    return source is not None and source.source.startswith(GENERATED)


def _generate(task: str, sources: dict[Part, DataSource | None], config: RunConfig) -> Any:
    """The generated task of `generated:NAME` sources, or None; `limit` is the number of rows of a part.

    Training and test rows are generated together, so that the generator keeps them disjoint.
    """
    generated = {part: source for part, source in sources.items() if _is_generated(source)}
    if not generated:
        return None
    from braidlora.tasks.generated import generate_suite

    for part, source in generated.items():
        if part == "validation":
            raise ConfigError(
                f"tasks.{task}.validation: a generated task has only training and test rows; set split.validation."
            )
        if others := [
            key for key in sorted(source.model_fields_set - {"source", "limit"}) if getattr(source, key)
        ]:
            raise ConfigError(
                f"tasks.{task}.{part}: {source.source} takes only `limit`; remove {', '.join(others)}."
            )
    names = {source.source.removeprefix(GENERATED) for source in generated.values()}
    if len(names) > 1:
        raise ConfigError(
            f"tasks.{task}: trains and tests on different generated tasks ({', '.join(sorted(names))}); make them two "
            "tasks."
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


def task_template(section: TaskSection, config: RunConfig) -> Template:
    """The prompt template of a task's rows, unless they are chats."""
    template = get_template(section.template or config.prompt.template, section.kind)
    return replace(template, variables=config.prompt.chat_template_kwargs) if template.chat else template


def _are_chats(section: TaskSection, rows: Mapping[Part, list[Row]]) -> bool:
    chats = sum("messages" in row for part in PARTS for row in rows[part])
    others = sum(map(len, rows.values())) - chats
    if chats and others:
        raise DataError(
            f"task {section.name}: {chats} rows are chats (`messages`), and {others} have an instruction instead. Make "
            "them two tasks, or bring all rows into one form."
        )
    return chats > 0


def _chat_template(section: TaskSection, config: RunConfig) -> Template:
    """The template of a task whose rows are chats: always the tokenizer's own."""
    key = "prompt.template" if section.template is None else f"tasks.{section.name}.template"
    name = section.template or config.prompt.template
    if name != "chat" and (section.template is not None or config.prompt.is_given("template")):
        raise ConfigError(
            f"{key}: {_shortened(name)} has no place for a chat, and the rows of task {section.name} are chats "
            "(`messages`). Remove it, or set it to chat: chats go through the tokenizer's own chat template."
        )
    return replace(get_template("chat"), variables=config.prompt.chat_template_kwargs)


def _shortened(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "…")


def _warn_of_lost_inputs(section: TaskSection, template: Template, rows: list[Row]) -> None:
    with_input = sum(1 for row in rows if row.get("input"))
    if with_input and not template.uses_input:
        warnings.warn(
            f"task {section.name}: {with_input} training rows have an `input`, but the template does not use it; add "
            "{input} to the template.",
            stacklevel=4,
        )
