"""`braidlora demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import verb
from braidlora.cli._compare import show


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "demo",
        _run,
        "compare LoRA, HydraLoRA and ALoRA on eight generated tasks; no network, no data needed",
    )
    parser.add_argument(
        "--with-references",
        action="store_true",
        help="also train the 24 single-task LoRAs that Δm%% is measured against",
    )
    parser.add_argument("--overwrite", action="store_true", help="train every run again")
    parser.add_argument("--no-report", action="store_true", help="write no report.html and no figures")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import load_config
    from braidlora.demo import demo

    recipe = load_config("demo", overrides)
    result = demo(
        recipe,
        with_references=args.with_references,
        overwrite=args.overwrite,
        report=not args.no_report,
        command=args.command,
        progress=not args.json,
    )
    show(result, Path(recipe.output), args)
