"""What the catalog says: the table in catalog.json, checked once and looked up by key."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.errors import ConfigError

PREFIX = "data:"
"""What a key of the catalog begins with where a recipe names a source."""

_TABLE = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True)
class DataFile:
    """A file of the catalog.

    Attributes:
        name: its place below `BRAIDLORA_DATA` and below the cache, such as `data/math/SVAMP/test.json`.
        size: in bytes, if known.
        sha256: of the file; None where only the repository's record of it is known.
        git_blob: the id under which its repository's commit lists it: the sha1 of `blob SIZE\\0` and the content.
        url: of the public file; None for one that is built from others, and for one that is nowhere public.
        build: the function of `_build` that makes it from `inputs`; None for a public file.
        inputs: names of the files that it is built from.
        license: of the data, as far as their publisher states it.
    """

    name: str
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None
    url: str | None = None
    build: str | None = None
    inputs: tuple[str, ...] = ()
    license: str = ""

    @property
    def origin(self) -> str:
        """How the file is obtained: `download`, `build`, or `local` (it is in no public place)."""
        return "download" if self.url else "build" if self.build else "local"


@dataclass(frozen=True)
class Part:
    """The rows of one part of a dataset: a file, and which of its rows."""

    file: str
    where: Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """A dataset: its key, what it is, and its parts (`train`, `test`)."""

    key: str
    about: str
    parts: Mapping[str, Part]


def data_sets() -> dict[str, DataSet]:
    """All datasets by key, in the order of the table."""
    return _table()[0]


def data_set(key: str) -> DataSet:
    """The dataset of a key.

    Raises:
        ConfigError: there is none; the message has similar keys.
    """
    known = data_sets()
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"no dataset {key!r} in the catalog. {hint}`braidlora data list` shows all {len(known)} keys."
        )
    return known[key]


def parts(key: str) -> tuple[str, ...]:
    """The parts that a dataset has; raises as `data_set`."""
    return tuple(data_set(key).parts)


def data_file(name: str) -> DataFile:
    """A file of the catalog by name."""
    return _table()[1][name]


@functools.cache
def _table() -> tuple[dict[str, DataSet], dict[str, DataFile]]:
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    files = {}
    for group in table["files"]:
        for name, facts in group["files"].items():
            path = facts.pop("path", None)
            files[name] = DataFile(
                name=name,
                url=f"{group['url']}{path}" if path is not None else None,
                license=group["license"],
                inputs=tuple(facts.pop("inputs", ())),
                **facts,
            )
    sets = {
        key: DataSet(
            key,
            facts["about"],
            {part: Part(rows["file"], rows.get("where", {})) for part, rows in facts["parts"].items()},
        )
        for key, facts in table["sets"].items()
    }
    return sets, files
