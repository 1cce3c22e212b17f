"""`braidlora federate`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError, TrainingError
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(
        verbs, "federate", _run, "train the clients of a federated recipe together, then score them"
    )
    parser.add_argument("recipe", help="a federated recipe file or a built-in name")
    parser.add_argument("--resume", metavar="auto", help="carry on after the last complete round")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier federation left in the directory"
    )
    parser.add_argument(
        "--rollback", type=int, metavar="ROUND",
        help="go back to a round that is kept and remove those after it; with --resume auto, go on from there. "
        "RECIPE may be the federation's directory",
    )  # fmt: skip
    parser.add_argument(
        "--references", type=Path, help="directory of a finished federation by rule local, for Δm%%"
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import FederatedConfig, load_config
    from braidlora.federated.simulation.driver import federate
    from braidlora.federated.simulation.table import format_federation
    from braidlora.runs import FederatedDirectory, failing_lines, hold

    if args.resume not in (None, "auto"):
        raise ConfigError(
            f"--resume {args.resume}: expected `auto`; rounds are found in the output directory."
        )
    config = load_config(_recipe(args), overrides, FederatedConfig)
    if args.rollback is not None:
        if Path(args.recipe).is_dir():
            config = config.model_copy(update={"output": args.recipe})
        if args.resume is None:
            with hold(FederatedDirectory.at(config.output).path):
                _roll_back(args, config.output)
            return
    with hold(FederatedDirectory.at(config.output).path):
        result = federate(
            config,
            resume=args.resume,
            overwrite=args.overwrite,
            rollback=args.rollback,
            references=args.references,
            progress=not args.json,
        )
        report, why_not = write_page(result.directory, _again(args.command))
    for line in failing_lines(result.metrics):  # the work is done without them, but nobody should miss it
        say(f"braidlora {args.verb}: warning: {line}", file=sys.stderr)
    if args.json:
        print_json({"directory": str(result.directory), **result.metrics})
        return
    say(format_federation(result.metrics))
    say(f"\nRun directory  {result.directory}\nAdapters       {result.directory}/clients/NAME/adapter")
    say(f"Report         {report or why_not}")


def _recipe(args: argparse.Namespace) -> str:
    """The recipe's file or name; for --rollback that of the directory that is named in its place."""
    if args.rollback is not None and Path(args.recipe).is_dir():
        return str(Path(args.recipe) / "config.yaml")
    return str(args.recipe)


def _roll_back(args: argparse.Namespace, output: str) -> None:
    from braidlora.federated.simulation.rollback import rollback
    from braidlora.runs import FederatedDirectory

    if args.overwrite:
        raise ConfigError(
            "--rollback and --overwrite exclude each other: one goes back, the other starts over."
        )
    directory = FederatedDirectory.at(output)
    done = rollback(directory, args.rollback)
    if args.json:
        print_json({"directory": str(directory.path), "round": done.round, "removed": done.removed})
        return
    removed = ", ".join(map(str, sorted(done.removed)))
    say(
        f"{directory.path}: stands at round {done.round}"
        + (
            f"; removed {'round' if len(done.removed) == 1 else 'rounds'} {removed}"
            if removed
            else " already"
        )
        + ". --resume auto goes on from there."
    )


def _again(command: str) -> str:
    """The command as the report names it: one that resumes, and neither starts over nor goes back."""
    words, given = shlex.split(command), []
    while words:
        word = words.pop(0)
        if word in ("--resume", "--rollback") and words:
            words.pop(0)
        elif word != "--overwrite" and not word.startswith(("--resume=", "--rollback=")):
            given.append(word)
    return shlex.join([*given, "--resume", "auto"])


def write_page(directory: Path, command: str) -> tuple[Path | None, str]:
    """The page with its figures, or why there is none: what it needs is an extra of the package."""
    from braidlora.reporting.federated_sections import read_federation
    from braidlora.reporting.page import write_report
    from braidlora.runs import hold

    with hold(directory):
        try:
            return write_report(directory, None, federated=read_federation(directory, command)), ""
        except ConfigError as error:
            return None, f"none: {error}"
        except OSError as error:
            raise TrainingError(
                f"{error.filename or directory}: the report cannot be written: {error.strerror or error}. The result "
                "is whole; free space on that disk or make it writable, then --resume auto writes the report."
            ) from error
