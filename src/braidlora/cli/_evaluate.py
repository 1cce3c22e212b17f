"""`braidlora evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, recipe_here, verb
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(verbs, "evaluate", _run, "score a run, an adapter folder or a base model on its test rows")
    parser.add_argument(
        "target", help="run directory, adapter folder, or base model (folder, hub name, `embedded`)"
    )
    parser.add_argument("--recipe", help="recipe with tasks and prompts; a run directory includes its own")
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="output folder for predictions and metrics.json (default: the target)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="regenerate every answer instead of reusing stored ones"
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.models.presence import refuse_missing

    refuse_missing(args.target)
    config = recipe_here(args.recipe, overrides) if args.recipe else None
    from braidlora.evaluation.run import evaluate
    from braidlora.evaluation.table import format_metrics

    metrics = evaluate(
        args.target,
        config,
        overrides=[] if config else overrides,
        directory=args.directory,
        resume=not args.fresh,
        progress=not args.json,
    )
    if args.json:
        print_json(metrics)
    else:
        say(format_metrics(metrics, {"majority": metrics.get("majority") or {}}))
