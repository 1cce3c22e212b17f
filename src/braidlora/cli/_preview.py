"""`braidlora preview`."""

from __future__ import annotations

import argparse
from typing import Any

from braidlora.cli._common import old_name, print_json, recipe_here, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say_styled


def add(verbs: Any) -> None:
    parser = verb(
        verbs, "preview", _run, "show encoded rows per task and mark the tokens that contribute to the loss"
    )
    parser.add_argument("recipe", help="a recipe file or a built-in name")
    rows = parser.add_argument(
        "--rows-per-task", type=int, metavar="N", default=2, help="rows to show per task (default 2)"
    )
    old_name(parser, "--rows", rows)


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import FederatedConfig, load_config, schema_of

    if args.rows_per_task < 1:
        raise ConfigError(f"--rows-per-task: got {args.rows_per_task}; expected at least 1.")
    schema = schema_of(args.recipe)
    federated = schema is FederatedConfig  # whose files may be folders of sites
    config = load_config(args.recipe, overrides, schema) if federated else recipe_here(args.recipe, overrides)
    from braidlora.models.tokenizer import load_tokenizer
    from braidlora.tasks.preview import preview

    if isinstance(config, FederatedConfig):
        from braidlora.federated.simulation.preview import federated_preview

        result = federated_preview(config, rows=args.rows_per_task, as_json=args.json)
    else:
        tokenizer = load_tokenizer(config.model)
        result = preview(config, tokenizer, rows=args.rows_per_task, as_json=args.json)
    if args.json:
        print_json(result)
    else:
        say_styled(str(result))
