"""Where two recipes, or other JSON values, differ; and defaults, for recipes that an earlier version wrote."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

NOTHING = "nothing"  # stands for a missing key

Difference = tuple[str, Any, Any]  # dotted key, old value, new value


def recipe_differences(old: dict[str, Any], new: dict[str, Any], schema: type[BaseModel]) -> list[Difference]:
    """`json_differences` of two recipes of a schema; a key that an older version lacked counts as its default."""
    return [
        (key, then, now)
        for key, then, now in json_differences(old, new)
        if not (then == NOTHING and is_default(schema, key, now))
    ]


def json_differences(old: Any, new: Any, prefix: str = "") -> list[Difference]:
    """Every place where two JSON values differ: dotted key, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            dotted = f"{prefix}.{key}" if prefix else str(key)
            found += json_differences(old.get(key, NOTHING), new.get(key, NOTHING), dotted)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = []
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            found += json_differences(one, other, f"{prefix}.{index}")
        return found
    return [] if old == new else [(prefix, old, new)]


def is_default(schema: type[BaseModel], key: str, value: Any) -> bool:
    """Whether `value` is the default of `key`.

    New keys are defined such that their default is the behavior of earlier versions, which did not have them.

    Args:
        schema: the schema of the recipe.
        key: dotted, with the index or name of list items, such as `tasks.snli.metric`.
        value: a value from `model_dump(mode="json")`.
    """
    *path, last = key.split(".")
    node: type[BaseModel] | None = schema
    for part in path:
        if node is None:
            return False
        if part in node.model_fields:  # otherwise it selects a list item
            node = section(node.model_fields[part].annotation)
    if node is None or last not in node.model_fields or node.model_fields[last].is_required():
        return False
    default = node.model_fields[last].get_default(call_default_factory=True)
    return bool(value == (default.model_dump(mode="json") if isinstance(default, BaseModel) else default))


def section(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `list[TaskSection]` or `DataSource | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = section(inner)
        if found is not None:
            return found
    return None
