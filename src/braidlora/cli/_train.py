"""`braidlora train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(verbs, "train", _run, "fine-tune a base model on the tasks of a recipe and evaluate it")
    parser.add_argument("recipe", help="a recipe file or a built-in name")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="resume from the newest checkpoint (auto) or from PATH"
    )
    parser.add_argument(
        "--allow-inexact-resume",
        action="store_true",
        help="resume even if optimizer, scheduler or RNG state is missing",
    )
    parser.add_argument("--overwrite", action="store_true", help="discard an earlier run in the directory")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import load_config
    from braidlora.evaluation.table import format_metrics
    from braidlora.one_run import train

    config = load_config(args.recipe, overrides)
    resume = args.resume if args.resume in (None, "auto") else Path(args.resume)
    result = train(
        config,
        resume=resume,
        allow_inexact_resume=args.allow_inexact_resume,
        overwrite=args.overwrite,
        progress=not args.json,
    )
    if not result.metrics:
        return  # in a distributed run, only the first process evaluates and reports
    if args.json:
        print_json({"directory": str(result.directory), **result.metrics})
        return
    if result.metrics.get("tasks"):
        say(format_metrics(result.metrics))
    if timing := result.metrics.get("timing"):
        say(
            f"trained on {timing['tokens']:,} tokens in {timing['training_seconds']:,.0f} s "
            f"({timing['tokens_per_second']:,.0f} tokens/s)"
        )
    say(f"\nRun directory  {result.directory}\nAdapter        {result.directory / 'adapter'}")
    say(f"Load it with   import braidlora; PeftModel.from_pretrained(base, '{result.directory / 'adapter'}')")
