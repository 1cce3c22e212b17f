"""`braidlora verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import CheckpointError
from braidlora.terminal import say

_SHOWN = 12  # files that the output for people lists of one kind


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "verify",
        _run,
        "check every file of a directory against what was written; changes nothing",
        overrides=False,
    )
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="run, federation, comparison, study, checkpoint, adapter or export, or a folder that holds some",
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.runs import verify

    report = verify(args.directory.expanduser())
    if args.json:
        print_json(report)
    else:
        say(_text(report))
    if report["damaged"] and report["holder"]:
        raise CheckpointError(
            f"{args.directory}: {len(report['damaged'])} damaged, {report['intact']} as they were written, while "
            f"process {report['holder']['pid']} on {report['holder']['host']} is writing there. Change nothing now; "
            "check again when it has ended."
        )
    if report["damaged"]:
        raise CheckpointError(
            f"{args.directory}: {len(report['damaged'])} damaged, {report['intact']} as they were written. Put the "
            "damaged files back from a copy; or remove them, and the command that wrote them makes them again "
            "(--resume auto, --overwrite)."
        )


def _text(report: dict[str, Any]) -> str:
    lines = [f"{report['directory']}: {report['what']}", f"{report['intact']} files as they were written"]
    if report["holder"]:
        holder = report["holder"]
        lines.append(f"process {holder['pid']} on {holder['host']} is writing there; so not all is whole yet")
    if damaged := report["damaged"]:
        lines += ["", f"{len(damaged)} damaged:", *(f"  {one['problem']}" for one in damaged)]
    for key, title in (
        ("unfinished", "not finished"),
        ("not_covered", "not covered by a manifest, so nothing is known of them"),
    ):
        if found := report[key]:
            more = [f"  … and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            lines += ["", f"{len(found)} {title}:", *(f"  {name}" for name in found[:_SHOWN]), *more]
    return "\n".join(lines)
