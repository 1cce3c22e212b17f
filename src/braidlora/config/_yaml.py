"""Read YAML 1.2 with the file and line of every value, without duplicate keys, and within fixed limits.

ruamel.yaml scans and parses; the values are built here from its events, without recursion, so that no document exceeds
the limits on values, depth and bytes, however its aliases multiply.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braidlora.config._scalars import kind_of, scalar
from braidlora.config._yaml_errors import plain_words
from braidlora.errors import ConfigError

Place = tuple[str | int, ...]
MOST_BYTES = 2**20
MOST_VALUES = 100_000  # with aliases expanded
DEEPEST = 50
_CORE = "tag:yaml.org,2002:"
_NOT_BREAKS = "\x85\u2028\u2029"  # line breaks in YAML 1.1 and ruamel.yaml, ordinary characters in YAML 1.2


@dataclass
class Document:
    """The data of a recipe and the place of each value (`places[("training", "epochs")] == "flan8.yaml:12"`)."""

    data: dict[str, Any]
    places: dict[Place, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: Place) -> str:
        """The place of `path`, or of the nearest enclosing value."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return "recipe"


class YamlProblem(ValueError):  # noqa: N818 (callers turn it into a ConfigError)
    """What is wrong with a YAML text, and in which line (from 1), if known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def parse_scalar(text: str) -> Any:
    """The value of an override, read as YAML: `1e-3`, `[a, b]`, `{a: 1}`, `null`, or a plain word.

    Raises:
        ConfigError: the text is not valid YAML.
    """
    try:
        builder = _build(text, "")
    except YamlProblem as problem:
        raise ConfigError(f"not readable as YAML: {problem}") from None
    if builder.document.problems:
        raise ConfigError(builder.document.problems[0].removeprefix(":1: "))
    return builder.root


def load_document(path: Path, content: bytes | None = None) -> Document:
    """Read the YAML file `path`; duplicate keys are collected as problems, invalid YAML raises ConfigError.

    Args:
        content: the content of the file, if it has been read already.
    """
    try:
        if content is None:
            with open(path, "rb") as file:
                content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such recipe file. `braidlora recipes` lists the built-in recipes."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    if content.startswith(b"GGUF"):
        raise ConfigError(
            f"{path}: a GGUF file, which is a base model, not a recipe. Name it in a recipe: model.path={path}."
        )
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"{path}: larger than the limit for recipes, {MOST_BYTES:,} bytes. Is it a data file? "
            f"{_init_hint(path)}"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if suffix_of_data(path):
            raise ConfigError(f"{path}: a data file, not a recipe. {_init_hint(path)}") from None
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8.") from None
    try:
        builder = _build(text, str(path))
    except YamlProblem as problem:
        where = f"{path}:{problem.line}" if problem.line else str(path)
        if suffix_of_data(path) and path.suffix.lower() != ".json":  # JSON is YAML, so that may be a recipe
            raise ConfigError(f"{path}: a data file, not a recipe. {_init_hint(path)}") from None
        hint = f" Is it a data file? {_init_hint(path)}" if suffix_of_data(path) else ""
        raise ConfigError(f"{where}: not valid YAML: {problem}.{hint}") from None
    root = {} if builder.root is None else builder.root
    if not isinstance(root, dict):
        kind = "a list" if isinstance(root, list) else "plain text" if isinstance(root, str) else repr(root)
        hint = f" Is it a data file? {_init_hint(path)}" if suffix_of_data(path) else ""
        raise ConfigError(
            f"{path}: expected a recipe, which is a mapping of sections (model, adapter, tasks, …); got {kind}.{hint}"
        )
    builder.document.data = root
    return builder.document


def _init_hint(path: Path) -> str:
    return f"`braidlora init {shlex.quote(str(path))}` writes a recipe for one."


def suffix_of_data(path: Path) -> bool:
    """Whether a file's name is that of a data file."""
    return path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx", ".txt")


def _build(text: str, name: str) -> _Builder:
    builder = _Builder(name)
    for event in _events(text):
        builder.take(event)
    return builder


def _events(text: str) -> Iterator[Any]:
    """ruamel.yaml's events, with the line breaks of YAML 1.2. Raises YamlProblem if the text is not YAML."""
    # Imported here because --help does not need it.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    private = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    stands_in = {ord(here): ord(there) for here, there in zip(_NOT_BREAKS, private, strict=False)}
    if len(stands_in) < len(_NOT_BREAKS):
        raise YamlProblem("the text has too many private-use characters")
    back = {there: here for here, there in stands_in.items()}
    try:
        for event in YAML(typ="safe", pure=True).parse(text.translate(stands_in)):
            if isinstance(getattr(event, "value", None), str):
                event.value = event.value.translate(back)
            yield event
    except MarkedYAMLError as error:
        problem, at_line = plain_words(error, text)
        raise YamlProblem(problem, at_line) from None
    except YAMLError as error:
        at = getattr(error, "position", None)
        line = text.count("\n", 0, at) + 1 if isinstance(at, int) else None
        raise YamlProblem(getattr(error, "reason", None) or str(error).split("\n")[0], line) from None


@dataclass
class _Open:
    """An unfinished mapping or sequence: its data, its path, and the key whose value is next."""

    data: dict[Any, Any] | list[Any]
    path: Place
    anchor: str | None
    line: int
    before: int  # number of values before this one
    key: Any = None
    has_key: bool = False
    lines: dict[Any, int] = field(default_factory=dict)
    merged: list[Any] = field(default_factory=list)


class _Builder:
    """Builds data from parser events."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: Any = None
        self.document = Document(data={}, places={(): name})
        self.values = 0
        self.documents = 0
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int]] = {}  # value, and the number of values in it

    def take(self, event: Any) -> None:
        kind = type(event).__name__
        line = event.start_mark.line + 1
        if kind == "DocumentStartEvent":
            self.documents += 1
            if self.documents > 1:
                raise YamlProblem("a second document starts here (`---`); expected one document", line)
            if event.version not in (None, (1, 2)):
                raise YamlProblem("%YAML declares a different version; expected 1.2", line)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            mapping = kind.startswith("Mapping")
            if event.tag not in (None, "!", _CORE + ("map" if mapping else "seq")):
                raise _refused_tag(event.tag, line)
            if self._wants_key():
                raise YamlProblem(
                    f"a {'mapping' if mapping else 'list'} as a key; expected a plain word", line
                )
            if len(self.stack) >= DEEPEST:
                raise YamlProblem(f"nested more than {DEEPEST} levels deep", line)
            self._count(1, line)
            path = self._path(line)
            self.anchors.pop(event.anchor, None)
            self.stack.append(_Open({} if mapping else [], path, event.anchor, line, self.values))
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            done = self.stack.pop()
            for source in done.merged:  # earlier ones win
                assert isinstance(done.data, dict)
                done.data = {**source, **done.data}
            if done.anchor:
                self.anchors[done.anchor] = (done.data, self.values - done.before + 1)
            self._put(done.data, done.line)
        elif kind == "ScalarEvent":
            self._count(1, line)
            value = _scalar(event, line)
            if event.anchor:
                self.anchors[event.anchor] = (value, 1)
            if self._wants_key() and event.value == "<<" and event.implicit[0]:
                value = _MERGE
            self._put(value, line)
        elif kind == "AliasEvent":
            if any(one.anchor == event.anchor for one in self.stack):
                raise YamlProblem(f"*{event.anchor} is inside &{event.anchor}, which would be infinite", line)
            if event.anchor not in self.anchors:
                raise YamlProblem(f"*{event.anchor}: no &{event.anchor} before it", line)
            value, size = self.anchors[event.anchor]
            self._count(size, line)
            self._put(copy.deepcopy(value), line)  # an override of one must not change the other

    def _count(self, more: int, line: int) -> None:
        self.values += more
        if self.values > MOST_VALUES:
            raise YamlProblem(f"more than {MOST_VALUES:,} values with aliases expanded", line)

    def _wants_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1].data, dict) and not self.stack[-1].has_key

    def _path(self, line: int) -> Place:
        """The path of the next value; also records its line."""
        if not self.stack:
            self.document.places[()] = f"{self.name}:{line}"
            return ()
        top = self.stack[-1]
        path = (*top.path, top.key if isinstance(top.data, dict) else len(top.data))
        self.document.places.setdefault(path, f"{self.name}:{line}")
        return path

    def _put(self, value: Any, line: int) -> None:
        if not self.stack:
            self.root = value
            return
        top = self.stack[-1]
        if isinstance(top.data, list):
            self._path(line)
            top.data.append(value)
        elif not top.has_key:
            self._key(top, value, line)
        else:
            top.has_key = False
            if top.key is _MERGE:
                top.merged += _merge_sources(value, line)
            elif top.key not in top.data:
                top.data[top.key] = value

    def _key(self, top: _Open, key: Any, line: int) -> None:
        top.key, top.has_key = key, True
        if key is _MERGE:
            return
        if isinstance(key, dict | list):  # by an alias
            raise YamlProblem("a mapping or list as a key; expected a plain word", line)
        if key in top.lines:
            dotted = ".".join(map(str, (*top.path, key)))
            self.document.problems.append(
                f"{self.name}:{line}: {dotted}: duplicate key (first on line {top.lines[key]}); keep one."
            )
        top.lines.setdefault(key, line)
        self.document.places[(*top.path, key)] = f"{self.name}:{line}"


_MERGE = object()  # the key `<<`


def _merge_sources(value: Any, line: int) -> list[dict[Any, Any]]:
    sources = value if isinstance(value, list) else [value]
    if not all(isinstance(source, dict) for source in sources):
        raise YamlProblem("`<<` needs a mapping or a list of mappings", line)
    return sources


def _scalar(event: Any, line: int) -> Any:
    tag = event.tag
    if tag is None:
        kind = kind_of(event.value) if event.implicit[0] else "str"
    elif tag == "!":
        kind = "str"
    else:
        kind = str(tag).removeprefix(_CORE)
        if not str(tag).startswith(_CORE) or kind not in ("null", "bool", "int", "float", "str"):
            raise _refused_tag(tag, line)
    try:
        return scalar(kind, event.value)
    except ValueError as error:
        raise YamlProblem(str(error), line) from None


def _refused_tag(tag: str, line: int) -> YamlProblem:
    name = str(tag).replace(_CORE, "!!")
    return YamlProblem(
        f"the tag {name} is rejected: a recipe is plain data, and Python tags could run code"
        if "python" in name
        else f"unknown tag {name}; a recipe is plain data without tags",
        line,
    )
