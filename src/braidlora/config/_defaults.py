"""Keys that a recipe did not have yet when an earlier version wrote it down."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel


def is_default(schema: type[BaseModel], key: str, value: Any) -> bool:
    """Whether `value` is what `key` is when a recipe does not give it.

    A key that an earlier version did not know changes nothing at its default: that is how later keys are made.

    Args:
        schema: of the recipe.
        key: dotted, with the index or the name of list items, e.g. `tasks.snli.metric`.
        value: as `model_dump(mode="json")` gives it.
    """
    *path, last = key.split(".")
    node: type[BaseModel] | None = schema
    for part in path:
        if node is None:
            return False
        if part in node.model_fields:  # otherwise it names an item of a list
            node = section(node.model_fields[part].annotation)
    if node is None or last not in node.model_fields or node.model_fields[last].is_required():
        return False
    default = node.model_fields[last].get_default(call_default_factory=True)
    return bool(value == (default.model_dump(mode="json") if isinstance(default, BaseModel) else default))


def section(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `list[TaskSection]` or `DataSource | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = section(inner)
        if found is not None:
            return found
    return None
