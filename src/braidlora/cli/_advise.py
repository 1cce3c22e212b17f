"""`braidlora advise`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "advise",
        _run,
        "measure how alike tasks are and where gradients conflict, for at most a twentieth of a comparison's cost",
    )
    parser.add_argument("recipe", help="a recipe file or a built-in name")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="what the probe may cost, as a share of the training rows of a comparison (default 0.05)",
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.advisor import advise
    from braidlora.advisor.cost import SHARE
    from braidlora.advisor.run import RESULT
    from braidlora.advisor.text import format_advice
    from braidlora.config import built_in_recipes, load_config
    from braidlora.runs import output_of

    config = load_config(args.recipe, overrides)
    output = output_of(config.output, "advise", overrides)
    result = advise(
        config,
        output,
        name=args.recipe if args.recipe in built_in_recipes() else Path(args.recipe).stem,
        share=SHARE if args.budget is None else args.budget,
        command=args.command,
        progress=not args.json,
    )
    if args.json:
        print_json(result)
        return
    say(f"\n{format_advice(result)}\n\nNumbers  {Path(output) / RESULT}")
