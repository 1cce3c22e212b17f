"""`braidlora demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.cli._compare import again, show
from braidlora.cli._federate import write_page
from braidlora.errors import ConfigError
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "demo",
        _run,
        "compare LoRA, HydraLoRA and ALoRA on eight generated tasks; no network, no data needed",
    )
    parser.add_argument(
        "--federated",
        action="store_true",
        help="instead: eight clients that share B alone, beside each on its own",
    )
    parser.add_argument(
        "--with-references",
        action="store_true",
        help="also train the 24 single-task LoRAs that Δm%% is measured against",
    )
    parser.add_argument("--overwrite", action="store_true", help="train every run again")
    parser.add_argument("--no-report", action="store_true", help="write no report.html and no figures")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.federated:
        _run_federated(args, overrides)
        return
    from braidlora.config import load_config
    from braidlora.demo import demo

    # One thread a run, so that two cores make two runs at a time; a thread more would not make one twice as fast.
    recipe = load_config("demo", ["training.threads=1", *overrides])
    result = demo(
        recipe,
        with_references=args.with_references,
        overwrite=args.overwrite,
        report=not args.no_report,
        command=again(args.command),
        progress=not args.json,
    )
    show(result, Path(recipe.output), args)


def _run_federated(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.federated.simulation.demo import federated_demo

    if args.with_references:
        raise ConfigError("--with-references belongs to the demo without --federated; leave one of them out.")
    result = federated_demo(overrides, overwrite=args.overwrite, quiet=args.json)
    together = Path(result["directories"][1])
    report, why_not = (None, "none: --no-report") if args.no_report else write_page(together, args.command)
    if args.json:
        print_json(result)
    else:
        say(f"Report         {report or why_not}")
