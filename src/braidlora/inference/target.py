"""What a path refers to for inference: an adapter, a merged model or a base, with its tasks and its base model."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from braidlora.config import (
    EvaluationSection,
    ModelSection,
    PromptSection,
    RunConfig,
    load_config,
    schema_of,
)
from braidlora.errors import ConfigError
from braidlora.models.gguf import SUFFIX as GGUF
from braidlora.models.loading import adapter_folder, client_folder, refuse_comparison
from braidlora.models.origin import Origin, recipe_of
from braidlora.models.presence import refuse_missing, refuse_missing_base
from braidlora.paths import expanded
from braidlora.runs import (
    ADAPTER_CARD,
    ADAPTER_CONFIG,
    AdapterCard,
    federation_around,
    read_adapter_card,
    run_around,
)
from braidlora.tasks import LabelSpace, Task, load_tasks, task_of_card

Kind = Literal["generate", "classify"]


@dataclass(frozen=True)
class Target:
    """An adapter, a merged model or a base, before anything large is loaded.

    Attributes:
        given: as the user named it.
        origin: of the adapter; without a folder for a merged model or a base.
        section: the base model to load, or the merged model.
        kind: a causal language model or a classifier.
        tasks: what it was trained on, without rows; empty if unknown.
        columns: by task, the column of each field in the rows it was trained on.
        label_space: of a classifier.
        evaluation, prompt: how its answers are taken.
        chat_template: the one of its training, if recorded.
    """

    given: str
    origin: Origin
    section: ModelSection
    kind: Kind
    tasks: dict[str, Task]
    columns: dict[str, dict[str, str]]
    label_space: LabelSpace | None
    evaluation: EvaluationSection
    prompt: PromptSection
    chat_template: str | None = None

    def task(self, name: str | None = None) -> Task:
        """A task by name; a model with a single task needs no name.

        Raises:
            ConfigError: there is no such task, or several and no name.
        """
        names = list(self.tasks)
        if not names:
            if self.given.endswith(GGUF):
                raise ConfigError(
                    f"{self.given}: a GGUF base model, not an adapter, so it has no tasks. `braidlora generate "
                    f"{self.given} --prompt TEXT` takes it; `predict` takes what `braidlora train` wrote."
                )
            raise ConfigError(
                f"{self.given}: does not record its tasks. Give the recipe it was trained with (--recipe RECIPE, "
                "load(…, recipe=…)), or use `generate`."
            )
        if name is None:
            if len(names) > 1:
                raise ConfigError(
                    f"--task: {self.given} has several tasks; choose one of {', '.join(names)}."
                )
            return self.tasks[names[0]]
        if name not in self.tasks:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--task: {self.given} has no task {name!r}.{hint} Its tasks are {', '.join(names)}."
            )
        return self.tasks[name]


def find_target(
    target: str | Path, *, base: str | Path | None = None, recipe: str | Path | None = None
) -> Target:
    """What `target` is; reads its card, or else the recipe of its run.

    Args:
        target: a run directory, checkpoint, adapter folder, export, merged model, federation client, or base model.
        base: the base model, if it is not where the adapter says.
        recipe: tasks and prompts of an adapter whose folder does not record them.

    Raises:
        ConfigError: the target is none of these, or its base is unknown.
        CheckpointError: its card is damaged, invalid or asks for more than inserting fields into a prompt.
    """
    path = expanded(target)
    refuse_missing(target)
    refuse_comparison(path)
    federation = federation_around(path)
    place = federation or run_around(path)
    folder = client_folder(path, federation) if federation is not None else adapter_folder(path, place)
    origin = Origin.of(folder, place)
    card = origin.card if folder is not None or place is not None else _card_of_merged(path)
    config = _recipe(origin, recipe)
    section = _base(str(target), origin, card, config, base)
    if recipe is None and card is not None and card.prompt is not None:
        return _from_card(str(target), origin, section, card)
    if config is not None:
        return _from_recipe(str(target), origin, section, config)
    if card is not None and any(task.kind == "classify" for task in card.tasks):
        raise ConfigError(
            f"{target}: its {ADAPTER_CARD} is of an earlier version, without prompts; give the recipe it was trained "
            "with: --recipe RECIPE."
        )
    return Target(
        str(target), origin, section, "generate", {}, {}, None, EvaluationSection(), PromptSection()
    )


def _card_of_merged(path: Path) -> AdapterCard | None:
    return read_adapter_card(path) if path.is_dir() else None


def _recipe(origin: Origin, given: str | Path | None) -> RunConfig | None:
    if given is not None:
        return load_config(given, [], schema_of(given))
    return recipe_of(origin.place) if origin.place is not None else None


def _base(
    target: str,
    origin: Origin,
    card: AdapterCard | None,
    config: RunConfig | None,
    base: str | Path | None,
) -> ModelSection:
    if origin.folder is None:
        if base is not None:
            raise ConfigError(f"--base: {target} is a complete model, not an adapter; leave it out.")
        return ModelSection(path=target)
    if config is not None:
        section = config.model
    elif card is not None and card.base is not None:
        record = card.base
        section = ModelSection(
            path=record.path,
            revision=record.revision,
            dtype=_allowed("dtype", record.dtype),
            quantization=_allowed("quantization", record.quantization),
        )
    else:
        section = ModelSection(path=_base_of_peft(origin.folder, base))
    if base is None:
        refuse_missing_base(target, section.path, "--base PATH (in Python: load(…, base=PATH))")
        return section
    return section.model_copy(update={"path": str(base), "gguf_file": None})


def _allowed(key: str, value: str | None) -> Any:
    """A recorded value, or the default if this version does not know it."""
    field = ModelSection.model_fields[key]
    return value if value in get_args(field.annotation) else field.default


def _base_of_peft(folder: Path, base: str | Path | None) -> str:
    if base is not None:
        return str(base)
    recorded = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    path = recorded.get("base_model_name_or_path") if isinstance(recorded, dict) else None
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{folder}: does not record its base model; give it with --base PATH.")
    return path


def _from_card(target: str, origin: Origin, section: ModelSection, card: AdapterCard) -> Target:
    place = f"{origin.folder or target}/{ADAPTER_CARD}"
    assert card.prompt is not None
    answers = card.answers.model_dump() if card.answers is not None else {}
    kind: Kind = card.tasks[0].kind if card.tasks else "generate"
    described = [task for task in card.tasks if task.template is not None]
    return Target(
        given=target,
        origin=origin,
        section=section,
        kind=kind,
        tasks={task.name: task_of_card(task, place) for task in described},
        columns={task.name: dict(task.columns) for task in described},
        label_space=LabelSpace.from_card(card) if kind == "classify" else None,
        evaluation=EvaluationSection(**answers),
        prompt=PromptSection(cutoff=max(8, card.prompt.cutoff)),
        chat_template=card.prompt.chat_template,
    )


def _from_recipe(target: str, origin: Origin, section: ModelSection, config: RunConfig) -> Target:
    tasks = load_tasks(config)
    label_space = origin.label_space(config, tasks)
    return Target(
        given=target,
        origin=origin,
        section=section,
        kind=config.kind,
        tasks={task.name: replace(task, test=[]) for task in tasks},
        columns={
            one.name: {str(field): column for field, column in one.columns.items()} for one in config.tasks
        },
        label_space=label_space,
        evaluation=config.evaluation,
        prompt=config.prompt,
    )
