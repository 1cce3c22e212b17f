"""`braidlora federate`."""

from __future__ import annotations

import argparse
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
        "--references", type=Path, help="directory of a finished federation by rule local, for Δm%%"
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import FederatedConfig, load_config
    from braidlora.federated.local import federate
    from braidlora.federated.table import format_federation
    from braidlora.runs import FederatedDirectory, hold

    if args.resume not in (None, "auto"):
        raise ConfigError(
            f"--resume {args.resume}: expected `auto`; rounds are found in the output directory."
        )
    config = load_config(args.recipe, overrides, FederatedConfig)
    with hold(FederatedDirectory.at(config.output).path):
        result = federate(
            config,
            resume=args.resume,
            overwrite=args.overwrite,
            references=args.references,
            progress=not args.json,
        )
        report, why_not = write_page(result.directory, args.command)
    if args.json:
        print_json({"directory": str(result.directory), **result.metrics})
        return
    say(format_federation(result.metrics))
    say(f"\nRun directory  {result.directory}\nAdapters       {result.directory}/clients/NAME/adapter")
    say(f"Report         {report or why_not}")


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
