"""YAML with places: every value's file and line, duplicate keys refused, no Python tags, YAML 1.2 scalars."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from braidlora.errors import ConfigError

Place = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader whose scalars are those of YAML 1.2: `no` is a word, `3e-4` a number.

    Answer options such as yes/no are common in tasks, and so are learning rates without a dot.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":int", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$"),
    list("-+.0123456789"),
)


@dataclass
class Document:
    """A recipe's plain data, and where each value stands (`places[("training", "epochs")] == "flan8.yaml:12"`)."""

    data: dict[str, Any]
    places: dict[Place, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: Place) -> str:
        """Where `path` stands, or the nearest enclosing place."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return "recipe"


def parse_scalar(text: str) -> Any:
    """The value of an override, read as YAML: `1e-3`, `[a, b]`, `{a: 1}`, `null`, or a plain word."""
    return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader: no Python objects are built


def load_document(path: Path, content: bytes | None = None) -> Document:
    """Read the YAML file `path`; duplicate keys are collected as problems, unreadable YAML raises ConfigError.

    Args:
        content: what the file holds, where that has been read already.
    """
    try:
        text = (path.read_bytes() if content is None else content).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such recipe file. `braidlora recipes` lists those that are built in."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save the recipe as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    try:
        loader = _Loader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        document = Document(data={}, places={(): str(path)})
        if node is None:
            return document
        _walk(node, (), str(path), document)
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        if "python/" in problem:
            problem += ". Python tags are refused: a recipe is plain data"
        raise ConfigError(f"{where}: not valid YAML: {problem}.") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of sections (model, adapter, tasks, …), got {type(data).__name__}."
        )
    document.data = data
    return document


def _walk(node: yaml.Node, path: Place, name: str, document: Document) -> None:
    document.places.setdefault(path, f"{name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                dotted = ".".join(map(str, (*path, key)))
                document.problems.append(
                    f"{name}:{line}: {dotted}: this key is given twice (first on line {seen[key]}); keep one."
                )
            seen[key] = line
            document.places[(*path, key)] = f"{name}:{line}"
            _walk(value_node, (*path, key), name, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _walk(child, (*path, index), name, document)
