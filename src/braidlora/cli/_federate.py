"""`braidlora federate`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from braidlora.cli._common import old_name, print_json, verb
from braidlora.errors import ConfigError, explain_write_failures
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(verbs, "federate", _run, "train the clients of a federated recipe together and score them")
    parser.add_argument("recipe", help="a federated recipe file or a built-in name")
    parser.add_argument("--resume", metavar="auto", help="resume after the last committed round")
    parser.add_argument(
        "--overwrite", action="store_true", help="discard an earlier federation in the directory"
    )
    parser.add_argument(
        "--rollback", type=int, metavar="ROUND",
        help="return to an earlier round still on disk and delete those after it; add --resume auto to continue "
        "from there. RECIPE may be the federation's directory",
    )  # fmt: skip
    local_run = parser.add_argument(
        "--local-run",
        metavar="RUN",
        type=Path,
        help="finished run of rule `local`, which Δm%% is measured against",
    )
    old_name(parser, "--references", local_run)


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import FederatedConfig, load_config
    from braidlora.federated.simulation.driver import federate
    from braidlora.federated.simulation.table import format_federation
    from braidlora.runs import FederatedDirectory, failing_lines, hold, output_of

    if args.resume not in (None, "auto"):
        raise ConfigError(
            f"--resume {args.resume}: expected `auto`, which resumes from the newest round in the output directory."
        )
    config = load_config(_recipe(args), overrides, FederatedConfig)
    own = args.rollback is not None and Path(args.recipe).is_dir()
    output = args.recipe if own else output_of(config.output, "federate", overrides)
    config = config.model_copy(update={"output": output})
    if args.rollback is not None and args.resume is None:
        with hold(FederatedDirectory.at(config.output).path):
            _roll_back(args, config.output)
        return
    with hold(FederatedDirectory.at(config.output).path):
        result = federate(
            config,
            resume=args.resume,
            overwrite=args.overwrite,
            rollback=args.rollback,
            local_run=args.local_run,
            progress=not args.json,
        )
        report, why_not = write_page(result.directory, _again(args.command))
    for line in failing_lines(result.metrics):  # the federation succeeded, but the user must see them
        say(f"braidlora {args.verb}: warning: {line}", file=sys.stderr)
    if args.json:
        print_json({"directory": str(result.directory), **result.metrics})
        return
    say(format_federation(result.metrics))
    say(f"\nRun directory  {result.directory}\nAdapters       {result.directory}/clients/NAME/adapter")
    say(f"Report         {report or why_not}")


def _recipe(args: argparse.Namespace) -> str:
    """Path or name of the recipe; with --rollback, RECIPE may be a federation directory, whose recipe is used."""
    if args.rollback is not None and Path(args.recipe).is_dir():
        return str(Path(args.recipe) / "config.yaml")
    return str(args.recipe)


def _roll_back(args: argparse.Namespace, output: str) -> None:
    from braidlora.federated.simulation.rollback import rollback
    from braidlora.runs import FederatedDirectory

    if args.overwrite:
        raise ConfigError(
            "--rollback and --overwrite are mutually exclusive: one goes back to a round, the other starts over."
        )
    directory = FederatedDirectory.at(output)
    gone = rollback(directory, args.rollback)
    if args.json:
        print_json({"directory": str(directory.path), "round": args.rollback, "removed": gone})
        return
    removed = ", ".join(map(str, sorted(gone)))
    say(
        f"{directory.path}: "
        + (
            f"rolled back to round {args.rollback}; removed {'round' if len(gone) == 1 else 'rounds'} {removed}"
            if removed
            else f"already at round {args.rollback}"
        )
        + ". Use --resume auto to continue from there."
    )


def _again(command: str) -> str:
    """The command as the report quotes it: with `--resume auto`, without `--overwrite` and `--rollback`."""
    words, given = shlex.split(command), []
    while words:
        word = words.pop(0)
        if word in ("--resume", "--rollback") and words:
            words.pop(0)
        elif word != "--overwrite" and not word.startswith(("--resume=", "--rollback=")):
            given.append(word)
    return shlex.join([*given, "--resume", "auto"])


def write_page(directory: Path, command: str) -> tuple[Path | None, str]:
    """Write the report with its figures; without the packages of the extra `report`, return the reason instead."""
    from braidlora.reporting.federated_sections import read_federation
    from braidlora.reporting.page import write_report
    from braidlora.runs import hold

    with hold(directory):
        try:
            with explain_write_failures(
                directory, "then --resume auto writes the report; the results are complete"
            ):
                return write_report(directory, None, federated=read_federation(directory, command)), ""
        except ConfigError as error:
            return None, f"none: {error}"
