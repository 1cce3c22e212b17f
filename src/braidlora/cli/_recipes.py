"""`braidlora recipes`."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(verbs, "recipes", _run, "list the built-in recipes, or print one", overrides=False)
    parser.add_argument("name", nargs="?", help="print this recipe's YAML")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import built_in_recipes, find_recipe

    if args.name:
        path = find_recipe(args.name)
        text = path.read_text(encoding="utf-8")
        print_json({"name": args.name, "path": str(path), "yaml": text}) if args.json else say(text, end="")
        return
    listed = {name: _description(path) for name, path in built_in_recipes().items()}
    if args.json:
        print_json(listed)
        return
    width = max(map(len, listed), default=0)
    for name, description in listed.items():
        say(f"{name:<{width}}  {description}")


def _description(path: Path) -> str:
    """The first sentence of the recipe's opening comment, after the commands that run it."""
    text = path.read_text(encoding="utf-8")
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.split("\n"))
    words = " ".join(line.lstrip("# ") for line in lines if not line.startswith("# braidlora "))
    return words.strip().split(". ")[0].rstrip(".") + "."
