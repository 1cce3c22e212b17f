"""The recipe as it is at a site, with what its `site.yaml` sets; problems name the line there. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from braidlora.config import (
    SUFFIXES,
    DataSource,
    Document,
    FederatedConfig,
    TaskSection,
    built_in_recipes,
    load_config,
    load_document,
)
from braidlora.errors import ConfigError, DataError
from braidlora.federated.flower.settings import SITE_FILE, SiteSettings
from braidlora.paths import expanded, find_data, nearby

_PARTS = ("train", "validation", "test")
_CHOOSING = ("where", "limit")
_OTHER_KIND = re.compile(r"[a-z]+:")  # `generated:sum`, `data:KEY`
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


def site_config(folder: Path, settings: SiteSettings) -> FederatedConfig:
    """The recipe as it is at a site: its own copy, with the site's places and ways to compute.

    Args:
        folder: the site's.
        settings: as read from its `site.yaml`.

    Raises:
        ConfigError: the recipe is not valid, or has no such client or task.
        DataError: rows of this client are not here.
    """
    place = _Places(folder)
    recipe = _recipe(folder, settings, place)
    document = load_document(recipe)
    _check_tasks(document, settings, place)
    overrides = _overrides(folder, settings, document, place)
    try:
        config = load_config(
            recipe, [f"{key}={value}" for key, (value, _) in overrides.items()], FederatedConfig
        )
    except ConfigError as error:
        raise ConfigError(_translated(str(error), recipe, overrides, place)) from None
    names = [client.name for client in config.clients() or []]
    if names and settings.name not in names:
        raise ConfigError(_unknown_client(settings, names, place))
    _check_sources(config, settings, folder, place)
    return config.model_copy(update={"output": str(folder / "unused")})


class _Places:
    """Says in which line of a site's settings a key is: `north/site.yaml:8: data.note`."""

    def __init__(self, folder: Path) -> None:
        path = folder / SITE_FILE
        self._document = load_document(path) if path.is_file() else Document({}, {(): str(path)})

    def __call__(self, *key: str) -> str:
        return f"{self._document.place(key)}: {'.'.join(key)}"


def _recipe(folder: Path, settings: SiteSettings, place: _Places) -> Path:
    """The file of the recipe: in the site's folder, or a built-in one."""
    given = folder.absolute() / expanded(settings.recipe)
    if given.is_file():
        return given
    if settings.recipe in built_in_recipes():
        return built_in_recipes()[settings.recipe]
    what = "is a folder" if given.is_dir() else "does not exist"
    raise ConfigError(f"{place('recipe')}: {_plain(given)} {what}; copy the federation's recipe there.")


def _check_tasks(recipe: Document, settings: SiteSettings, place: _Places) -> None:
    """Reject rows of a task that the recipe does not have, or of a part that no task has."""
    sections = recipe.data.get("tasks")
    names = (
        [one.get("name") for one in sections if isinstance(one, dict)] if isinstance(sections, list) else []
    )
    for task, sources in settings.data.items():
        if names and task not in names:
            raise ConfigError(
                f"{place('data', task)}: the recipe has no task of this name; its tasks are "
                f"{', '.join(map(str, names))}."
            )
        for part in () if isinstance(sources, str) else sources:
            if part not in _PARTS:
                raise ConfigError(
                    f"{place('data', task, part)}: unknown key; expected {{train: FILE, test: FILE}} (or validation)."
                )


def _overrides(
    folder: Path, settings: SiteSettings, recipe: Document, place: _Places
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """By key of the recipe, the site's value, and its key in the settings."""
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}
    if settings.model is not None:
        found["model.path"] = (_model(folder, settings.model, place), ("model",))
    for task, sources in settings.data.items():
        if isinstance(sources, str):
            found[f"tasks.{task}.train"] = (_rows(folder, sources, recipe, task, "train"), ("data", task))
            continue
        for part, source in sources.items():
            found[f"tasks.{task}.{part}"] = (_rows(folder, source, recipe, task, part), ("data", task, part))
    if settings.rank is not None:
        if settings.name not in (names := _named_clients(recipe)):
            if names:
                raise ConfigError(_unknown_client(settings, names, place))
            raise ConfigError(
                f"{place('rank')}: the recipe lists no clients with ranks of their own; remove it here, or list "
                f"{settings.name} in federation.clients at the server and at all sites."
            )
        found[f"federation.clients.{settings.name}.rank"] = (settings.rank, ("rank",))
    for key, value in (
        ("training.batch_size", settings.batch_size),
        ("training.precision", settings.precision),
        ("training.threads", settings.threads),
        ("model.dtype", settings.dtype),
        ("model.quantization", settings.quantization),
    ):
        if value is not None:
            found[key] = (value, (key.partition(".")[2],))
    return {key: (_as_yaml(value), own) for key, (value, own) in found.items()}


def _rows(folder: Path, source: str, recipe: Document, task: str, part: str) -> str | dict[str, Any]:
    """The site's file, of which the recipe chooses rows (`where`, `limit`); how to read it is the site's matter."""
    path = _place(folder, source)
    sections = recipe.data.get("tasks")
    for section in sections if isinstance(sections, list) else []:
        entry = section.get(part) if isinstance(section, dict) and section.get("name") == task else None
        if isinstance(entry, dict) and (chosen := {key: entry[key] for key in _CHOOSING if key in entry}):
            return {"source": path, **chosen}
    return path


def _named_clients(recipe: Document) -> list[str]:
    federation = recipe.data.get("federation")
    clients = federation.get("clients") if isinstance(federation, dict) else None
    return (
        [str(one.get("name")) for one in clients if isinstance(one, dict)]
        if isinstance(clients, list)
        else []
    )


def _unknown_client(settings: SiteSettings, names: Iterable[str], place: _Places) -> str:
    return f"{place('name')}: {settings.name!r} is not a client of the recipe; they are {', '.join(names)}."


def _translated(
    text: str, recipe: Path, overrides: dict[str, tuple[str, tuple[str, ...]]], place: _Places
) -> str:
    """The problems of a recipe, where those of a site's settings name their line."""
    found = text
    for key, (_, own) in overrides.items():
        found = found.replace(f"override --{key}:", f"{place(*own)}:")
    return found.replace(
        " in the recipe:", f" in {SITE_FILE} and {recipe.name}:" if found != text else f" in {recipe.name}:"
    )


def _check_sources(config: FederatedConfig, settings: SiteSettings, folder: Path, place: _Places) -> None:
    """Reject files of this client's tasks that are not here."""
    partition = config.federation.partition
    if partition is not None:
        own = [config.divided_task()] if partition.by == "file" else []
    else:
        own = next((one.tasks for one in config.clients() or [] if one.name == settings.name), [])
    for section in config.tasks:
        common = section.name in config.federation.common_test
        for part in _PARTS if section.name in own else _PARTS[2:] if common else ():
            source: DataSource | None = getattr(section, part)
            if source is not None and _is_missing(source):
                raise DataError(_missing_rows(section, part, source.source, settings, folder, place))


def _is_missing(source: DataSource) -> bool:
    """Whether this is a file or folder, and not here."""
    given = source.source
    if not given or source.format == "hub" or _OTHER_KIND.match(given):
        return False
    if Path(given).suffix.lower() not in SUFFIXES and _HUB_NAME.fullmatch(given):
        return False
    return not find_data(given).exists()


def _missing_rows(
    section: TaskSection, part: str, source: str, settings: SiteSettings, folder: Path, place: _Places
) -> str:
    task, given = section.name, settings.data.get(section.name)
    if isinstance(given, str) and part == "train":
        return f"{place('data', task)}: {_not_here(folder, given)}"
    if isinstance(given, dict) and part in given:
        return f"{place('data', task, part)}: {_not_here(folder, given[part])}"
    if given is None:
        return (
            f"{place('data')}: the recipe's rows for {task}, {source}, are not here; set `data` to this site's own: "
            f"{{{task}: FILE}}, or {{{task}: {{train: FILE, test: FILE}}}}."
        )
    train = given if isinstance(given, str) else given.get("train", "FILE")
    return (
        f"{place('data', task)}: the recipe also has {part} rows, {source}, which are not here; give this site's own: "
        f"{task}: {{train: {train}, {part}: FILE}}."
    )


def _not_here(folder: Path, given: str) -> str:
    """That there is no such file, and what lies in its folder."""
    path = _plain(folder.absolute() / expanded(given))
    start = "" if expanded(given).is_absolute() else " (relative paths start at the site's folder)"
    return f"{path}: no such file or folder{start}. {nearby(path)}."


def _plain(path: Path) -> str:
    """The path without `..`."""
    return os.path.normpath(path)


def _model(folder: Path, given: str, place: _Places) -> str:
    found = _place(folder, given)
    local = given.startswith((".", "/", "~")) or given.count("/") > 1
    if local and not _OTHER_KIND.match(given) and not find_data(found).exists():
        raise ConfigError(f"{place('model')}: {_not_here(folder, given)}")
    return found


def _place(folder: Path, path: str) -> str:
    """A path of site.yaml, relative to its folder; names of other kinds (`generated:sum`, `embedded`) as they are."""
    given = folder.absolute() / path
    return str(given) if given.exists() else path


def _as_yaml(value: Any) -> str:
    """A value as an override on the command line has it; JSON is YAML too."""
    return json.dumps(value, ensure_ascii=False)
