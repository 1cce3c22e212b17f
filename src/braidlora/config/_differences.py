"""Where two recipes, or other JSON values, differ."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from braidlora.config._defaults import is_default

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
