"""`braidlora federate add-client`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.terminal import say


def add(verbs: Any) -> None:
    parser = verb(verbs, "federate add-client", _run, "train a new client for a finished federation")
    parser.add_argument("federation", type=Path, metavar="RUN", help="directory of the finished federation")
    parser.add_argument("--name", required=True, help="name of the new client")
    parser.add_argument(
        "--tasks",
        dest="tasks_of",
        metavar="A,B",
        required=True,
        help="tasks of the recipe that the client has",
    )
    parser.add_argument(
        "--train",
        metavar="FILE",
        help="the client's own training rows (with one task only); the recipe's `where` and `limit` apply",
    )
    parser.add_argument("--test", metavar="FILE", help="the client's own test rows")
    parser.add_argument(
        "--rank",
        type=int,
        help="rank of the client (default: that of all clients, adapter.r where they differ)",
    )
    parser.add_argument(
        "--epochs",
        type=float,
        help="epochs of training (default: the total of the other clients over all rounds)",
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.models.presence import refuse_missing

    refuse_missing(args.federation)
    from braidlora.federated.simulation.add_client import add_client

    result = add_client(
        args.federation,
        args.name,
        tasks=args.tasks_of.split(","),
        train=args.train,
        test=args.test,
        rank=args.rank,
        epochs=args.epochs,
        overrides=overrides,
    )
    if args.json:
        print_json(result)
        return
    scores = [f"{stage} {result[stage]:.1f}" for stage in ("before", "after") if result[stage] is not None]
    say(
        f"{result['client']}: received {result['received_bytes']:,} bytes, trained {', '.join(result['trained'])} on "
        f"{result['rows']} rows; score {', '.join(scores) or 'not available: no test rows'}"
    )
    say(f"Adapter        {result['directory']}/adapter")
