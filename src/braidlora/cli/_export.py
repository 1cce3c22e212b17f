"""`braidlora export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(verbs, "export", _run, "write an adapter as a plain LoRA for PEFT, or merged into its base")
    parser.add_argument("target", help="run directory or adapter folder")
    parser.add_argument(
        "--output", type=Path, help="where the export goes (default: beside the target, TARGET-lora)"
    )
    parser.add_argument(
        "--static-weights",
        metavar="task=NAME|uniform|W1,W2,…",
        help="expert weights to fix a token-routed adapter at: a task's mean, all alike, or numbers",
    )
    parser.add_argument(
        "--weights-from",
        metavar="RUN",
        type=Path,
        help="the run whose task=NAME is measured, if not the target's",
    )
    parser.add_argument("--rows", type=int, help="training rows to measure task=NAME on (default 256)")
    parser.add_argument(
        "--merge", action="store_true", help="write the base with the LoRA added to its weights"
    )
    parser.add_argument("--recipe", help="tasks, prompts and base of an adapter outside a run")
    parser.add_argument("--base", help="the base model, if not the one that recipe or adapter name")
    parser.add_argument(
        "--no-scores", action="store_true", help="do not measure what fixed expert weights cost"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.export.run import export
    from braidlora.export.write import description

    if args.rows is not None and args.rows < 1:
        raise ConfigError(f"--rows: got {args.rows}; expected at least 1.")
    record = export(
        args.target,
        args.output,
        static_weights=args.static_weights,
        weights_from=args.weights_from,
        rows=args.rows,
        merge=args.merge,
        recipe=args.recipe,
        overrides=overrides,
        base=args.base,
        score=not args.no_scores,
        overwrite=args.overwrite,
        progress=not args.json,
    )
    if args.json:
        print_json(record)
        return
    say(description(record))
    load = "AutoModel….from_pretrained(" if record["form"] == "merged" else "PeftModel.from_pretrained(base, "
    say(f"\nWritten to    {record['directory']}\nLoad it with  {load}'{record['directory']}')")
