"""Tasks in an adapter's card: written at training time, read when the adapter is used without its rows."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from braidlora import __version__
from braidlora.config import RunConfig
from braidlora.errors import CheckpointError, ConfigError
from braidlora.runs import AdapterCard, AnswerCard, BaseRecord, PromptCard, PromptText, TaskCard
from braidlora.tasks._task import Task
from braidlora.tasks.encode import bos_tokens
from braidlora.tasks.labels import LabelSpace
from braidlora.tasks.load import task_template
from braidlora.tasks.options import option_texts
from braidlora.tasks.templates import Template, check_format, fields_of

_LIBRARIES = ("torch", "transformers", "peft")
_MOST_FIELDS = 32
_LONGEST = 1 << 20  # characters of a chat template


def adapter_card(
    tasks: Sequence[Task],
    label_space: LabelSpace | None,
    base: BaseRecord | None,
    config: RunConfig,
    tokenizer: Any,
) -> AdapterCard:
    """The content of `braidlora.json` for an adapter that was trained on `tasks`.

    Args:
        tasks: the tasks of the training.
        label_space: for `classify` tasks; all of its tasks are listed, because the head has their logits.
        base: the base model.
        config: the recipe.
        tokenizer: the base's.
    """
    cards = (
        [TaskCard(name=task.name, kind=task.kind) for task in tasks]
        if label_space is None
        else label_space.cards()
    )
    known = {task.name: task for task in tasks}
    cards = [_described(card, known.get(card.name), config) for card in cards]
    return AdapterCard(
        braidlora=__version__,
        tasks=cards,
        labels=label_space.names if label_space is not None else None,
        base=base,
        prompt=_prompt_card(config, tokenizer, any(card.template and card.template.chat for card in cards)),
        answers=AnswerCard(
            mode=config.evaluation.mode,
            batch_size=config.evaluation.batch_size,
            num_beams=config.evaluation.num_beams,
            max_new_tokens=config.evaluation.max_new_tokens,
            length_normalized=config.evaluation.length_normalized,
        ),
        versions=_versions(),
    )


def task_of_card(card: TaskCard, place: str) -> Task:
    """The task that a card describes, without rows.

    Args:
        card: with a template; it may come from an untrusted source.
        place: what the card belongs to, for messages.

    Raises:
        CheckpointError: the template is not a format string of this kind of row's fields.
    """
    assert card.template is not None
    return Task(
        name=card.name,
        kind=card.kind,
        template=_template(card, card.template, place),
        train=[],
        validation=[],
        test=[],
        metric=card.metric or "exact_match",
        extract=card.extract,
        options=card.options,
        max_new_tokens=card.max_new_tokens,
        labels=card.labels,
        option_texts=card.option_texts,
        mode=card.mode if card.kind == "generate" else None,
    )


def _described(card: TaskCard, task: Task | None, config: RunConfig) -> TaskCard:
    """The card of a task with what the recipe says about it; `task` is None where a client has no rows of it."""
    section = next((one for one in config.tasks if one.name == card.name), None)
    if section is None:
        return card
    template = task.template if task is not None else task_template(section, config)
    with_input, without_input = template.evaluation or (template.with_input, template.without_input)
    options = list(task.options) if task is not None and task.options and card.kind == "generate" else None
    return card.model_copy(
        update={
            "template": PromptText(
                name=template.name,
                with_input=with_input,
                without_input=without_input,
                chat=template.chat,
                chat_template_kwargs=dict(template.variables),
            ),
            "columns": {field: column for field, column in section.columns.items() if field != column},
            "options": options,
            "option_texts": option_texts(task) if task is not None and options is not None else None,
            "mode": section.mode,
            "extract": section.extract,
            "max_new_tokens": section.max_new_tokens,
            "metric": task.metric if task is not None else section.metric,
        }
    )


def _prompt_card(config: RunConfig, tokenizer: Any, chat: bool) -> PromptCard:
    template = getattr(tokenizer, "chat_template", None)
    text = template if isinstance(template, str) else None
    return PromptCard(
        cutoff=config.prompt.cutoff,
        bos_token_ids=bos_tokens(tokenizer) if config.kind == "generate" else [],
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        chat_template=text if chat and text is not None and len(text) <= _LONGEST else None,
        chat_template_digest=None if text is None else chat_template_digest(text),
    )


def chat_template_digest(text: str) -> str:
    """`sha256:` and 64 hex digits of a chat template."""
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _template(card: TaskCard, text: PromptText, place: str) -> Template:
    if text.chat:
        return Template(text.name, chat=True, variables=text.chat_template_kwargs)
    allowed = ("text",) if card.kind == "classify" else ("instruction", "input")
    try:
        for one in (text.with_input, text.without_input):
            check_format(one, allowed)
            if len(fields_of(one)) > _MOST_FIELDS:  # a long row inserted many times would fill the memory
                raise ConfigError(f"template: inserts the row more than {_MOST_FIELDS} times")
        if not fields_of(text.with_input):
            raise ConfigError(f"template: {text.with_input!r} does not use the row")
    except ConfigError as error:
        raise CheckpointError(f"{place}: task {card.name}: {error}") from None
    return Template(text.name, text.with_input, text.without_input)
