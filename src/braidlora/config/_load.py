"""Read a recipe file, apply `--dotted.overrides`, and check the result, reporting all problems at once."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import BaseModel, ValidationError

from braidlora import catalog
from braidlora.config._conflicts import ConflictError
from braidlora.config._differences import section
from braidlora.config._dump import dump_yaml
from braidlora.config._expected import expected
from braidlora.config._federated import FederatedConfig
from braidlora.config._federation import ALTERNATIVES
from braidlora.config._no_recipe import no_recipe
from braidlora.config._other_methods import OTHER_METHOD
from braidlora.config._schema import RunConfig
from braidlora.config._suggest import ELSEWHERE, nearest, suggest_key
from braidlora.config._task_problems import GENERATED, HELD_OUT
from braidlora.config._yaml import DEEPEST, Document, Place, load_document, parse_scalar
from braidlora.errors import ConfigError

BUILT_IN = Path(__file__).parent.parent / "recipes"
_SOURCES = ("train", "validation", "test")
_OVERRIDE = "override --"
SectionT = TypeVar("SectionT", bound=BaseModel)


# Other names of built-in recipes, which say the base.
_ALSO_CALLED = {
    "commonsense4_smollm2": "commonsense4",
    "fed_flan8_smollm2": "fed_flan8",
    "fed_flan8_smollm2_het": "fed_flan8_het",
    "flan8_smollm2": "flan8",
}


def built_in_recipes() -> dict[str, Path]:
    """The recipes in the package, by name (`flan8`, `paper/flan_llama2_7b`, …)."""
    return {
        str(path.relative_to(BUILT_IN).with_suffix("")): path for path in sorted(BUILT_IN.rglob("*.yaml"))
    }


def find_recipe(recipe: str | Path) -> Path:
    """The file of `recipe`: a path, or the name of a built-in recipe.

    Raises:
        ConfigError: it is neither; the message names what is similar.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    built_in, name = built_in_recipes(), _ALSO_CALLED.get(str(recipe), str(recipe))
    if name in built_in:
        return built_in[name]
    if path.is_dir():
        raise ConfigError(
            f"{recipe}: a folder; expected a recipe file or the name of a built-in recipe (`braidlora recipes`)."
        )
    raise ConfigError(no_recipe(path, built_in))


@overload
def load_config(
    recipe: str | Path, overrides: Sequence[str] = (), *, content: bytes | None = None
) -> RunConfig: ...


@overload
def load_config(
    recipe: str | Path, overrides: Sequence[str], schema: type[SectionT], *, content: bytes | None = None
) -> SectionT: ...


def load_config(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    schema: type[BaseModel] = RunConfig,
    *,
    content: bytes | None = None,
) -> BaseModel:
    """Read `recipe` (a path or a built-in name), apply `overrides`, and check everything.

    Args:
        recipe: path of a YAML file, or the name of a built-in recipe.
        overrides: `dotted.key=value` each, the value read as YAML. List items are selected by index, by `name`, or
            all with `*`: `tasks.snli.train.limit=50`, `tasks.*.train.limit=50`.
        schema: the pydantic model of the recipe.
        content: the content of the file `recipe`, if it has been read already.

    Raises:
        ConfigError: with every problem of the recipe, each with its file and line.
    """
    document = load_document(find_recipe(recipe)) if content is None else load_document(Path(recipe), content)
    document.data = copy.deepcopy(document.data)
    # `split` first: whether a task has held-out rows decides what `tasks.*.test.limit` applies to.
    for override in sorted(overrides, key=lambda one: not one.removeprefix("--").startswith("split.")):
        _apply(override, document)
    return check(document, schema, "the recipe" if issubclass(schema, RunConfig) else Path(recipe).name)


def schema_of(recipe: str | Path) -> type[RunConfig]:
    """The schema of a recipe: `FederatedConfig` if it has a section `federation`, otherwise `RunConfig`.

    Raises:
        ConfigError: the recipe does not exist or cannot be read.
    """
    return FederatedConfig if "federation" in load_document(find_recipe(recipe)).data else RunConfig


def override_config(config: SectionT, overrides: Mapping[str, Any]) -> SectionT:
    """A copy of `config` with new values for some dotted keys (list items as in `load_config`), checked again.

    Raises:
        ConfigError: with every problem of the new values.
    """
    document = Document(config.model_dump(mode="json"))
    for key, value in overrides.items():
        _set(document.data, key.split("."), value, (), f"{_OVERRIDE}{key}", document)
    return check(document, type(config))


def check(document: Document, schema: type[SectionT], what: str = "the recipe") -> SectionT:
    """Validate a document against `schema`; raises one ConfigError with all problems of the YAML and the schema.

    Args:
        what: the document is, for the message.
    """
    problems = list(document.problems)
    config = None
    try:
        config = schema.model_validate(document.data)
    except ValidationError as error:
        for detail in _merged(error.errors(), document):
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, ConflictError):
                problems += [
                    f"{_where(document.place(_path(key)), key)}{text}." for key, text in cause.problems
                ]
            else:
                problems.append(_describe(detail, document, schema))
    if problems or config is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in {what}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def dump_config(config: BaseModel) -> str:
    """The configuration as YAML, including defaults; `load_config` of it gives the same configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(override: str, document: Document) -> None:
    key, separator, text = override.partition("=")
    key = key.removeprefix("--")
    if not separator or not key:
        raise ConfigError(
            f"override {override!r}: expected --section.key=value, such as --training.learning_rate=1e-4."
        )
    try:
        value = parse_scalar(text)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: the value is {error}. If it is text, quote it.") from None
    keys = key.split(".")
    if len(keys) > DEEPEST:
        raise ConfigError(
            f"override {override[:60]!r}…: the key has {len(keys)} parts; at most {DEEPEST} are allowed."
        )
    _set(document.data, keys, value, (), f"{_OVERRIDE}{key}", document)


def _set(node: Any, keys: list[str], value: Any, path: Place, origin: str, document: Document) -> None:
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        chosen = _indices(node, key, origin)
        if key == "*" and len(rest) > 1 and rest[0] in _SOURCES:  # only tasks with such rows
            limit = rest[1:] == ["limit"] and value is not None
            chosen = [index for index in chosen if _has_rows(node[index], rest[0], limit, document.data)]
            if not chosen:
                raise ConfigError(
                    f"{origin}: no task of this recipe has {'' if limit else 'a source of '}`{rest[0]}` rows, so this "
                    "would have no effect. Remove it"
                    + (f", or hold rows out with split.{rest[0]}=0.1." if rest[0] in HELD_OUT else ".")
                )
        for index in chosen:
            if rest:
                _set(node[index], rest, value, (*path, index), origin, document)
            else:
                node[index] = value
                document.places[(*path, index)] = origin
        return
    if not isinstance(node, dict):
        raise ConfigError(f"{origin}: `{'.'.join(map(str, path))}` is {node!r} and has no key {key!r}.")
    if rest:
        child = node.get(key)
        if child is None:
            child = {}
            document.places[(*path, key)] = origin
        elif isinstance(child, str) and key in _SOURCES:
            child = {"source": child}
        node[key] = child
        _set(child, rest, value, (*path, key), origin, document)
    else:
        node[key] = value
        if value is not None:
            _drop_alternatives(node, path, key, document)
        for known in [place for place in document.places if place[: len(path) + 1] == (*path, key)]:
            del document.places[known]
        document.places[(*path, key)] = origin


def _has_rows(task: Any, part: str, limit: bool, recipe: Mapping[str, Any]) -> bool:
    """Whether an override of a part of all tasks applies to this one.

    Args:
        task: as in YAML.
        part: `train`, `validation` or `test`.
        limit: the override sets `limit`, which also applies to rows that the task has without a source of its own.
        recipe: as in YAML, for its `split`.
    """
    if not isinstance(task, dict) or task.get(part):
        return True
    if part in task:  # null: no such rows
        return False
    key = task.get("data")
    if isinstance(key, str) and key in catalog.data_sets() and part in catalog.parts(key):
        return True
    train = task.get("train") or (isinstance(key, str) and f"{catalog.PREFIX}{key}")
    if not limit or part not in HELD_OUT or not train:
        return False
    source = train.get("source") if isinstance(train, dict) else train
    if part == "test" and str(source).startswith(GENERATED):
        return True
    split = recipe.get("split")
    return isinstance(split, dict) and bool(split.get(part))


def _drop_alternatives(node: dict[str, Any], section: Place, key: str, document: Document) -> None:
    """Remove the recipe's alternative to an overridden key; two overrides of alternatives still conflict."""
    alternatives = ALTERNATIVES.get(section, ())
    for other in alternatives if key in alternatives else ():
        overridden = document.places.get((*section, other), "").startswith(_OVERRIDE)
        if other != key and other in node and not overridden:
            del node[other]
            document.places.pop((*section, other), None)


def _indices(items: list[Any], key: str, origin: str) -> list[int]:
    if key == "*":
        return list(range(len(items)))
    if key.isdigit() and int(key) < len(items):
        return [int(key)]
    names = {index: item.get("name") for index, item in enumerate(items) if isinstance(item, dict)}
    if key in names.values():
        return [index for index, name in names.items() if name == key]
    known = ", ".join(map(str, names.values())) or f"0 to {len(items) - 1}"
    raise ConfigError(f"{origin}: no item {key!r} in the list; the items are {known} (or * for all).")


def _merged(details: Sequence[Any], document: Document) -> list[dict[str, Any]]:
    """One problem per place: for a value of a union type, pydantic reports one error per type."""
    merged: dict[Place, dict[str, Any]] = {}
    for detail in details:
        location: Place = tuple(detail["loc"])
        while detail["type"] != "missing" and not _exists(document.data, location):
            location = location[:-1]  # the last part is the name of a type, not a key
        if OTHER_METHOD in (detail["type"], merged.get(location, {}).get("type")):
            merged[location] = merged.get(location, {**detail, "loc": location})
        elif location in merged:
            merged[location]["msg"] += ", or " + detail["msg"].removeprefix("Input should be ")
        else:
            merged[location] = {**detail, "loc": location}
    return list(merged.values())


def _exists(node: Any, location: Place) -> bool:
    """Whether the data has a value at `location`."""
    try:
        for part in location:
            node = node[part]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _describe(detail: Any, document: Document, schema: type[BaseModel]) -> str:
    location: Place = tuple(detail["loc"])
    place = document.place(location)
    dotted = ".".join(str(part) for part in location)
    prefix = _where(place, dotted)
    kind = detail["type"]
    if kind == "extra_forbidden" and location[-1] == "trust_remote_code":
        text = (
            "rejected: braidlora never runs code from a model repository. Use a model class of transformers."
        )
    elif kind == "extra_forbidden" and location == ("federation",):
        text = "this is a federated recipe; use `braidlora federate`."
    elif kind == "extra_forbidden":
        return _unknown_key(place, location, schema)
    elif kind == "missing":
        text = "required, but missing."
    elif kind == OTHER_METHOD:
        text = f"{detail['msg']}."
    elif kind == "value_error":
        text = f"{detail['ctx']['error']}."
    elif kind == "model_type":
        fields = _fields(schema, location)
        text = f"got {_short(detail['input'])}; expected a section with the keys {', '.join(fields)}."
        if location == ("model",) and isinstance(detail["input"], str):
            text += f" Write {'--' if place.startswith(_OVERRIDE) else ''}model.path={detail['input']}."
    else:
        text = f"got {_short(detail['input'])}; {expected(detail['msg'])}."
    return prefix + text


def _where(place: str, key: str) -> str:
    """The start of a problem: its place and its key, which an override's place says already."""
    return f"{place}: {key}: " if key and place != f"{_OVERRIDE}{key}" else f"{place}: "


def _unknown_key(place: str, location: Place, schema: type[BaseModel]) -> str:
    """The problem of a key that no section has, with the one that was meant."""
    dotted, last = ".".join(map(str, location)), str(location[-1])
    fields = _fields(schema, location[:-1])
    near = None if last in ELSEWHERE else nearest(last, fields)
    meant = near or suggest_key(dotted, schema)
    if place.startswith(_OVERRIDE):
        given = place.removeprefix(_OVERRIDE)
        if near:  # keep the names of list items, and the keys below
            parts = given.split(".")
            meant = ".".join([*parts[: len(location) - 1], near, *parts[len(location) :]])
        hint = f"; did you mean {shlex.quote(f'--{meant}')}?" if meant else "."
        return f"{place}: unknown key{hint} The keys here are: {', '.join(fields)}."
    hint = f"; did you mean `{meant}`?" if meant else "."
    return f"{place}: {dotted}: unknown key{hint} The keys here are: {', '.join(fields)}."


def _path(key: str) -> Place:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _fields(schema: Any, location: Place) -> list[str]:
    """The keys of the section at `location`."""
    node = section(schema)
    for part in location:
        if node is None or isinstance(part, int) or part not in node.model_fields:
            continue
        node = section(node.model_fields[part].annotation) or node
    return list(node.model_fields) if node is not None else []
