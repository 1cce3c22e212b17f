"""Defaults of a schema, for recipes that an earlier version wrote without newer keys."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel


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
    for inner in typing.get_args(annotation):
        found = section(inner)
        if found is not None:
            return found
    return None
