"""`braidlora demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import old_name, print_json, verb
from braidlora.cli._compare import again, given_seeds, show
from braidlora.cli._federate import write_page
from braidlora.errors import ConfigError
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "demo",
        _run,
        "compare LoRA, HydraLoRA and ALoRA on eight generated tasks; needs no network and no data",
    )
    parser.add_argument(
        "--federated",
        action="store_true",
        help="run the federated demo instead: eight clients that share only B, compared with local training",
    )
    parser.add_argument("--seeds", metavar="A,B,…", help="seeds of the runs (default 0,1,2)")
    single_task = parser.add_argument(
        "--single-task",
        action="store_true",
        help="also train one LoRA per task and seed, as the reference for Δm%%",
    )
    old_name(parser, "--with-references", single_task)
    old_name(parser, "--references", single_task)
    parser.add_argument("--overwrite", action="store_true", help="retrain every run")
    parser.add_argument("--no-report", action="store_true", help="skip report.html and the figures")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.federated:
        _run_federated(args, overrides)
        return
    from braidlora.comparison import compare
    from braidlora.config import load_config
    from braidlora.runs import output_of

    # One thread per run: two cores then train two runs at a time, and a second thread would not double the speed.
    recipe = load_config("demo", ["training.threads=1", *overrides])
    recipe = recipe.model_copy(update={"output": output_of(recipe.output, "compare", overrides)})
    result = compare(
        recipe,
        name="demo",
        methods=("lora", "hydralora", "alora"),
        seeds=given_seeds("0,1,2" if args.seeds is None else args.seeds),
        references="single-task" if args.single_task else "none",
        overwrite=args.overwrite,
        report=not args.no_report,
        command=again(args.command),
        progress=not args.json,
    )
    show(result, Path(recipe.output), args)


def _run_federated(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.federated.simulation.demo import federated_demo

    for option, given in (("--single-task", args.single_task), ("--seeds", args.seeds is not None)):
        if given:
            hint = " Give its seed with --seed=N." if option == "--seeds" else ""
            raise ConfigError(f"{option} does not apply to --federated; leave one of them out.{hint}")
    result = federated_demo(overrides, overwrite=args.overwrite, quiet=args.json)
    together = Path(result["directories"][1])
    report, why_not = (None, "none: --no-report") if args.no_report else write_page(together, args.command)
    if args.json:
        print_json(result)
    else:
        say(f"Report         {report or why_not}")
