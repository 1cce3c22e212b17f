"""`braidlora train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import load_call, print_json, recipe_here, verb
from braidlora.errors import ConfigError, explain_write_failures
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.config import RunConfig


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
    parser.add_argument("--no-report", action="store_true", help="skip report.html and the figures")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = recipe_here(args.recipe, overrides)
    from braidlora.evaluation.table import format_metrics
    from braidlora.one_run import train

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
    report, why_not = (
        (None, "none: --no-report") if args.no_report else _write_page(result.directory, config, args)
    )
    if args.json:
        print_json({"directory": str(result.directory), **result.metrics})
        return
    if result.metrics.get("tasks"):
        say(format_metrics(result.metrics, {"majority": result.metrics.get("majority") or {}}))
    if timing := result.metrics.get("timing"):
        say(
            f"trained on {timing['tokens']:,} tokens in {timing['training_seconds']:,.0f} s "
            f"({timing['tokens_per_second']:,.0f} tokens/s)"
        )
    _say_advice(result.directory, config)
    say(f"\nRun directory  {result.directory}\nAdapter        {result.directory / 'adapter'}")
    say(f"Load it with   {load_call(result.directory / 'adapter')}")
    say(f"Answer rows    braidlora predict {result.directory} --task {config.tasks[0].name} --file ROWS")
    say(f"Report         {report or why_not}")


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.training.model_dump(include={"learning_rate", "epochs", "max_steps"})


def _write_page(directory: Path, config: RunConfig, args: argparse.Namespace) -> tuple[Path | None, str]:
    """Write the report with its figures; without the packages of the extra `report`, return the reason instead."""
    from braidlora.reporting.page import write_report
    from braidlora.reporting.run_sections import read_run
    from braidlora.runs import hold

    command = args.command.replace(" --overwrite", "")
    command += "" if "--resume" in command else " --resume auto"
    with hold(directory):
        try:
            with explain_write_failures(
                directory, "then --resume auto writes the report; the results are complete"
            ):
                return write_report(directory, None, run=read_run(directory, command, _settings(config))), ""
        except ConfigError as error:
            return None, f"none: {error}"


def _say_advice(directory: Path, config: RunConfig) -> None:
    from braidlora.reporting.run_sections import read_run, run_advice, run_findings

    run = read_run(directory, "", _settings(config))
    say("")
    for finding in run_findings(run):
        say(f"! {finding}")
    for line in run_advice(run):
        say(line)
