"""`braidlora compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError, TrainingError
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.comparison import Sweep


def add(verbs: Any) -> None:
    parser = verb(
        verbs, "compare", _run, "train a recipe with several methods and seeds, and say which is better"
    )
    parser.add_argument("recipe", help="a recipe file or a built-in name")
    parser.add_argument(
        "--methods",
        metavar="A,B,…",
        help="lora, lora-matched, hydralora, moelora, alora (default: all; with --sweep lora and the recipe's)",
    )
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="NAME={…}",
        help="a row of your own: a PEFT configuration {peft_type: LOHA, r: 8}, or recipe values {adapter.r: 16}",
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B,…", help="default 0,1,2")
    parser.add_argument("--baseline", metavar="ROW", help="what the rows are set against (default lora)")
    parser.add_argument(
        "--references",
        choices=("single-task", "none"),
        default="single-task",
        help="train a LoRA per task and seed, which Δm%% needs (default), or not",
    )
    parser.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="KEY=A,B,…",
        help="values that every row tries; validation rows choose",
    )
    parser.add_argument("--sweep", metavar="KEY=A,B,…", help="a row for each value")
    parser.add_argument(
        "--matched",
        choices=("none", "parameters", "rank"),
        help="with --sweep, what the rank keeps fixed: trainable parameters, or num_experts x r (default none)",
    )
    parser.add_argument("--workers", default="auto", metavar="N|auto", help="processes (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="train every run again")
    parser.add_argument("--no-report", action="store_true", help="write no report.html and no figures")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.comparison import compare
    from braidlora.config import built_in_recipes, load_config

    recipe = load_config(args.recipe, overrides)
    result = compare(
        recipe,
        name=args.recipe if args.recipe in built_in_recipes() else Path(args.recipe).stem,
        methods=None if args.methods is None else [word for word in args.methods.split(",") if word],
        rows=dict(_row(given) for given in args.row),
        seeds=_values("seeds", args.seeds),
        baseline=args.baseline,
        references=args.references,
        tune=dict(_key_and_values("tune", given) for given in args.tune),
        sweep=_sweep(args.sweep, args.matched),
        workers=_workers(args.workers),
        overwrite=args.overwrite,
        report=not args.no_report,
        command=again(args.command),
        progress=not args.json,
    )
    show(result, Path(recipe.output), args)


def again(command: str) -> str:
    """The command as the tables name it: one that carries on, and so does not throw away what is finished."""
    return command.replace(" --overwrite", "")


def show(result: dict[str, Any], directory: Path, args: argparse.Namespace) -> None:
    """Print a comparison as a table, and where it stands, or as JSON.

    Raises:
        TrainingError: with every run that failed, so that the exit code says so.
    """
    from braidlora.comparison import as_text

    if args.json:
        print_json(result)
    else:
        say(f"{as_text(result)}\n\nTable   {directory / 'comparison.md'}")
        if not args.no_report:
            say(f"Report  {directory / 'report.html'}")
    if result["failed"]:
        runs = "\n  ".join(f"{failed['run']}: {failed['reason']}" for failed in result["failed"])
        raise TrainingError(f"the table is without runs that failed:\n  {runs}")


def _row(given: str) -> tuple[str, Any]:
    name, separator, text = given.partition("=")
    if not separator:
        raise ConfigError(f"--row {given}: expected NAME={{…}}, e.g. --row loha='{{peft_type: LOHA, r: 8}}'.")
    return name, _parse("row", given, text)


def _sweep(given: str | None, matched: Any) -> Sweep | None:
    from braidlora.comparison import Sweep

    if given is None:
        if matched is not None:
            raise ConfigError("--matched: says what a sweep keeps fixed; give --sweep KEY=A,B,… too.")
        return None
    return Sweep(*_key_and_values("sweep", given), matched or "none")


def _key_and_values(option: str, given: str) -> tuple[str, list[Any]]:
    key, separator, text = given.partition("=")
    if not separator or not text:
        raise ConfigError(f"--{option} {given}: expected KEY=A,B,…, e.g. training.learning_rate=1e-4,1e-3.")
    return key.removeprefix("--"), _values(option, text)


def _values(option: str, text: str) -> list[Any]:
    values: list[Any] = _parse(option, text, f"[{text}]")
    return values


def _parse(option: str, given: str, text: str) -> Any:
    from braidlora.config import parse_scalar

    try:
        return parse_scalar(text)
    except ConfigError as error:
        raise ConfigError(f"--{option} {given}: {error}; check brackets and quotes.") from None


def _workers(given: str) -> Any:
    if given != "auto" and not (given.isdecimal() and 1 <= int(given[:9]) <= 1024):
        raise ConfigError(
            f"--workers: got {given[:40]!r}; expected `auto`, or a whole number from 1 to 1024."
        )
    return given if given == "auto" else int(given)
