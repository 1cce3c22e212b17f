"""`braidlora demo`."""

from __future__ import annotations

import argparse
from typing import Any

from braidlora.cli._common import print_json, verb


def add(verbs: Any) -> None:
    parser = verb(verbs, "demo", _run, "train ALoRA on eight generated tasks; no network, no data needed")
    parser.add_argument(
        "--federated", action="store_true", help="eight clients that share B alone, beside each on its own"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished demo run")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.federated:
        from braidlora.federated.demo import federated_demo

        result = federated_demo(overrides, overwrite=args.overwrite, quiet=args.json)
    else:
        from braidlora.demo import demo

        result = demo(overrides, overwrite=args.overwrite, quiet=args.json)
    if args.json:
        print_json(result)
