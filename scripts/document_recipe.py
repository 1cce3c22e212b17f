"""Write the tables of recipe keys in recipes.md and federated.md under docs/reference, between their markers.

python scripts/document_recipe.py          # writes
python scripts/document_recipe.py --check  # exits with 1 if docs and schema differ
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from braidlora.config import FederationSection, RunConfig

DOCS = Path(__file__).parent.parent / "docs" / "reference"
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"


def key_tables() -> str:
    """One Markdown table per section of the recipe."""
    parts = [_table("top level", RunConfig, "")]
    for name, field in RunConfig.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            prefix = "tasks.NAME." if name == "tasks" else f"{name}."
            parts.append(_table(f"`{name}`", section, prefix))
    return "\n\n".join(parts)


def federation_table() -> str:
    """Table of the `federation` section, which only federated recipes have."""
    return _table("`federation`", FederationSection, "federation.")


PAGES: dict[str, Callable[[], str]] = {"recipes.md": key_tables, "federated.md": federation_table}


def _table(title: str, section: type[BaseModel], prefix: str) -> str:
    lines = [
        f"### {title}",
        "",
        (section.__doc__ or "").strip(),
        "",
        "| key | value | default | |",
        "|---|---|---|---|",
    ]
    for name, field in section.model_fields.items():
        if prefix == "" and _section(field.annotation) is not None:
            continue
        lines += _rows(name, field, prefix)
    return "\n".join(lines)


def _rows(name: str, field: FieldInfo, prefix: str) -> list[str]:
    inner = _section(field.annotation)
    text = field.description or ""
    if inner is not None:
        below = f"{prefix}{name}.NAME." if _is_list(field.annotation) else f"{prefix}{name}."
        nested = [row for key, item in inner.model_fields.items() for row in _rows(key, item, below)]
        return nested if inner.__name__ != "DataSource" or name == "train" else [
            f"| `{prefix}{name}` | as `train` | none | {text} |"
        ]  # fmt: skip
    default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
    bounds = ", ".join(_bound(item) for item in field.metadata if _bound(item))
    choices = ", ".join(f"`{example}`" for example in field.examples or ())
    kind = _type(field.annotation)
    if choices:
        kind = f"{choices} or mapping" if kind.endswith(" or mapping") else choices
    value = kind + (f", {bounds}" if bounds else "")
    return [f"| `{prefix}{name}` | {value} | {default} | {text} |"]


def _plain(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _bound(item: object) -> str:
    for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if getattr(item, attribute, None) is not None:
            return f"{sign} {getattr(item, attribute)}"
    parts = [_bound(part) for part in getattr(item, "metadata", [])]
    return ", ".join(part for part in parts if part)


def _type(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is typing.Annotated:
        bounds = _bound(typing.cast(object, arguments[1]))
        return _type(arguments[0]) + (f" {bounds}" if bounds else "")
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        element, *bounds = _type(arguments[0]).split(" ", 1)
        return " ".join([f"list of {element}s", *bounds])
    if origin is dict:
        return "mapping"
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return names.get(annotation, str(annotation))  # type: ignore[call-overload]


def _is_list(annotation: object) -> bool:
    inside = typing.get_args(annotation)
    return typing.get_origin(annotation) is list or any(_is_list(inner) for inner in inside)


def _section(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _section(inner)
        if found is not None:
            return found
    return None


def page_with_tables(page: str, tables: str) -> str:
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for name, tables in PAGES.items():
        path = DOCS / name
        page = path.read_text(encoding="utf-8")
        wanted = page_with_tables(page, tables())
        if not args.check:
            path.write_text(wanted, encoding="utf-8")
        elif page != wanted:
            sys.exit(f"docs/reference/{name} is out of date. Run: python scripts/document_recipe.py")


if __name__ == "__main__":
    main()
