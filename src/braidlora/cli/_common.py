"""What the verbs share: how one is declared, and JSON on stdout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from braidlora.terminal import json_printable


def verb(
    verbs: Any, name: str, run: Callable[..., Any], text: str, *, overrides: bool = True
) -> argparse.ArgumentParser:
    suffix = ", --dotted.key=value for any key of the recipe" if overrides else ""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}{suffix}.", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, takes_overrides=overrides)
    return parser


def print_json(value: Any) -> None:
    print(json_printable(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False)))
