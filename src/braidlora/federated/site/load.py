"""One site's part of a federated recipe: its own rows, and of the other tasks only what the recipe says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from braidlora.config import ClientSection, FederatedConfig, TaskSection
from braidlora.errors import ConfigError
from braidlora.federated.site.clients import Client, client_files, make_client, with_rows
from braidlora.models.tokenizer import load_tokenizer
from braidlora.tasks import LabelSpace, Task, encode_tasks, load_tasks
from braidlora.tasks.checks import warn_of_lengths, warn_of_prompts, warn_of_rows
from braidlora.tasks.load import GENERATED


@dataclass(frozen=True)
class Site:
    """What a site loads of a recipe.

    Args:
        client: with its rows.
        label_space: of the federation, for `classify` tasks.
        common: the tasks of the common test, with their test rows.
    """

    client: Client
    label_space: LabelSpace | None
    common: list[Task] = field(default_factory=list)


def load_site(
    config: FederatedConfig, name: str, label_space: LabelSpace | None = None, *, common: bool = True
) -> Site:
    """Read one client's rows. Files of other clients need not exist here.

    Args:
        config: the recipe, the same at all sites but for the places of files.
        name: of the client.
        label_space: of the federation, if it is known; default: from the `options` of all `classify` tasks.
        common: whether to load the common test as well, whose files the site then has.

    Raises:
        ConfigError: the recipe has no such client, divides one dataset among clients, or does not name all labels.
        DataError: a source or a row cannot be used, or the client has no training rows.
    """
    config, section = _own_section(config, name)
    shared = config.federation.common_test if common else []
    loaded = _site_tasks(config, [*section.tasks, *shared], label_space)
    tasks = [task if task.name in section.tasks else with_rows(task, {}) for task in loaded]
    client = make_client(config, section, tasks)
    if config.kind == "classify" and label_space is None:
        label_space = LabelSpace.of(tasks)
    return Site(client, label_space, [task for task in loaded if task.name in shared])


def check_for_sites(config: FederatedConfig) -> None:
    """Reject a recipe that no site could load, whatever its rows are. Reads no files of rows.

    Raises:
        ConfigError, DataError: as `load_site` would at every site.
    """
    _check_partition(config)
    # Only a site knows where its rows are.
    sections = [_without_sources(section) for section in config.tasks]
    tasks = _site_tasks(config.model_copy(update={"tasks": sections}), [], None)
    if config.kind == "classify":
        LabelSpace.of(tasks)


def warn_of_site(config: FederatedConfig, site: Site) -> list[str]:
    """Warn of what is probably wrong with a site's own rows, as `train` does; returns the warnings.

    Raises:
        ConfigError, DataError: as training would for these rows.
    """
    tasks = site.client.own_tasks()
    tokenizer = load_tokenizer(config.model)
    found = warn_of_rows(tasks, config, whole=False)
    rows = encode_tasks(site.client.tasks, tokenizer, config.prompt, "train", site.label_space)
    return found + warn_of_lengths({"train": rows}, config) + warn_of_prompts(tasks, tokenizer, config)


def _own_section(config: FederatedConfig, name: str) -> tuple[FederatedConfig, ClientSection]:
    """The client's section, and the recipe with the client's own files as the sources of its task."""
    partition = config.federation.partition
    if partition is None:
        sections = {section.name: section for section in config.clients() or []}
        if name not in sections:
            raise ConfigError(
                f"federation.clients: no client {name!r}; they are {', '.join(sorted(sections))}."
            )
        return config, sections[name]
    _check_partition(config)
    task = config.divided_task()
    divided = next(section for section in config.tasks if section.name == task)
    files = client_files(divided, name)
    if name not in files:
        assert divided.train is not None
        raise ConfigError(f"task {task}: {divided.train.source} has no file for client {name!r}.")
    own = divided.model_copy(update=files[name])
    tasks = [own if section.name == task else section for section in config.tasks]
    [section] = config.with_ranks([ClientSection(name=name, tasks=[task])])
    return config.model_copy(update={"tasks": tasks}), section


def _check_partition(config: FederatedConfig) -> None:
    """Raise ConfigError for a partition that a site cannot make from its own rows."""
    federation = config.federation
    partition = federation.partition
    if partition is None:
        return
    if partition.by != "file":
        raise ConfigError(
            f"federation.partition.by: {partition.by} divides one dataset among clients, which only a simulation can. "
            "Give every site its own rows with federation.clients, or with `by: file`."
        )
    if federation.ranks is not None:
        raise ConfigError(
            "federation.ranks: a site cannot determine its place in the list from its own file. Name the clients and "
            "their ranks in federation.clients, or leave ranks out."
        )


def _site_tasks(config: FederatedConfig, names: Sequence[str], label_space: LabelSpace | None) -> list[Task]:
    """Every task of the recipe in order, with rows only in the named ones."""
    sections = [
        section if section.name in names or _is_generated(section) else _without_sources(section)
        for section in config.tasks
    ]
    tasks = [
        task if task.name in names else with_rows(task, {})
        for task in load_tasks(config.model_copy(update={"tasks": sections}))
    ]
    if config.kind != "classify":
        return tasks
    if label_space is not None:
        own_first = sorted(tasks, key=lambda task: task.name not in names)
        label_space.check(own_first, "the federation")
        return [dataclasses.replace(task, labels=label_space.task_labels[task.name]) for task in tasks]
    if unnamed := [section.name for section in config.tasks if section.options is None]:
        raise ConfigError(
            f"tasks.{unnamed[0]}.options: missing"
            + (f" (and of {', '.join(unnamed[1:])})" if unnamed[1:] else "")
            + ". A site reads only its own rows, so all labels of every `classify` task must be listed there, in the "
            "same order at all sites."
        )
    return tasks


def _without_sources(section: TaskSection) -> TaskSection:
    return section.model_copy(update={"train": None, "validation": None, "test": None})


def _is_generated(section: TaskSection) -> bool:
    sources = (section.train, section.test)
    return all(source is None or source.source.startswith(GENERATED) for source in sources)
