"""`braidlora preview`."""

from __future__ import annotations

import argparse
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say_styled


def add(verbs: Any) -> None:
    parser = verb(
        verbs, "preview", _run, "show encoded rows per task, with the tokens that carry loss marked"
    )
    parser.add_argument("recipe", help="a recipe file or a built-in name")
    parser.add_argument("--rows", type=int, default=2, help="rows per task (default 2)")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import FederatedConfig, load_config, schema_of
    from braidlora.tasks.preview import preview

    if args.rows < 1:
        raise ConfigError(f"--rows: got {args.rows}; expected at least 1.")
    config = load_config(args.recipe, overrides, schema_of(args.recipe))
    if isinstance(config, FederatedConfig):
        from braidlora.federated.simulation.preview import federated_preview

        result = federated_preview(config, rows=args.rows, as_json=args.json)
    else:
        result = preview(config, rows=args.rows, as_json=args.json)
    if args.json:
        print_json(result)
    else:
        say_styled(str(result))
