"""`braidlora export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from braidlora.cli._common import load_call, old_name, print_json, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(
        verbs, "export", _run, "export an adapter as a plain LoRA for PEFT, or merge it into its base"
    )
    parser.add_argument("target", help="run directory or adapter folder; with --best, a comparison")
    parser.add_argument(
        "--best", action="store_true", help="export the run that the verdict of a comparison recommends"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="output folder (default: TARGET-lora or, with --best, TARGET-best)",
    )
    parser.add_argument(
        "--static-weights",
        metavar="task=NAME|uniform|W1,W2,…",
        help="fixed expert weights for a token-routed adapter: a task's mean, uniform, or explicit numbers",
    )
    parser.add_argument(
        "--weights-from",
        metavar="RUN",
        type=Path,
        help="run that provides task=NAME, if not the target's own",
    )
    rows = parser.add_argument(
        "--rows-per-task", type=int, metavar="N", help="training rows used to measure task=NAME (default 256)"
    )
    old_name(parser, "--rows", rows)
    parser.add_argument(
        "--merge", action="store_true", help="merge the LoRA into the base and write the full model"
    )
    parser.add_argument("--recipe", help="recipe with tasks, prompts and base, for an adapter outside a run")
    parser.add_argument("--base", help="base model, if not the one named by the recipe or adapter")
    parser.add_argument(
        "--no-scores", action="store_true", help="do not measure the cost of fixed expert weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.models.presence import refuse_missing

    if args.rows_per_task is not None and args.rows_per_task < 1:
        raise ConfigError(f"--rows-per-task: got {args.rows_per_task}; expected at least 1.")
    for given in (args.target, args.base, args.weights_from):
        if given is not None:
            refuse_missing(given)
    from braidlora.export.run import export
    from braidlora.export.write import description

    target, output, advice = args.target, args.output, None
    if args.best:
        from braidlora.comparison.best import best_run

        target, advice = best_run(args.target)
        given = Path(args.target)
        if advice.get("undecided"):
            say(f"undecided: {advice['what']} Exporting {advice['choice']}: {target}", file=sys.stderr)
        output = output or given.with_name(f"{given.name or given.resolve().name}-best")
    record = export(
        target,
        output,
        unchanged=args.best and not args.merge and args.static_weights is None,
        static_weights=args.static_weights,
        weights_from=args.weights_from,
        rows=args.rows_per_task,
        merge=args.merge,
        recipe=args.recipe,
        overrides=overrides,
        base=args.base,
        score=not args.no_scores,
        overwrite=args.overwrite,
        progress=not args.json,
    )
    if args.json:
        print_json(record if advice is None else {**record, "advice": advice})
        return
    if advice is not None:
        say(f"{advice['what']}\nRun  {target}\n")
    say(description(record))
    folder = record["directory"]
    load = f"AutoModel….from_pretrained('{folder}')" if record["form"] == "merged" else load_call(folder)
    say(f"\nWritten to    {folder}\nLoad it with  {load}")
