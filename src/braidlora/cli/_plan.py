"""`braidlora plan`."""

from __future__ import annotations

import argparse
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(
        verbs, "plan", _run, "compute parameters, bytes and memory of a recipe without loading weights"
    )
    parser.add_argument("recipe", nargs="?", help="a training or federated recipe file, or a built-in name")
    parser.add_argument(
        "--paper", action="store_true", help="print the communication table of arXiv 2509.25414"
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.paper == bool(args.recipe) or (args.paper and overrides):
        raise ConfigError("expected either a recipe (with optional overrides) or --paper alone.")
    from braidlora.plan.run import plan

    result = plan(args.recipe, overrides)
    from braidlora.plan.text import format_plan

    if args.json:
        print_json(result)
    else:
        say(format_plan(result))
