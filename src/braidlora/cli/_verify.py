"""`braidlora verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import CheckpointError
from braidlora.paths import expanded
from braidlora.terminal import say

_SHOWN = 12  # files listed per category in the text output


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "verify",
        _run,
        "check every file of a directory against its manifest; changes nothing",
        overrides=False,
    )
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="run, federation, comparison, study, checkpoint, adapter or export, or a folder that contains any of them",
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.runs import verify

    report = verify(expanded(args.directory))
    if args.json:
        print_json(report)
    else:
        say(_text(report))
    if report["damaged"] and report["holder"]:
        raise CheckpointError(
            f"{args.directory}: {len(report['damaged'])} damaged, {report['intact']} intact, but process "
            f"{report['holder']['pid']} on {report['holder']['host']} is still writing there. Do not change anything "
            "now; check again when it has finished."
        )
    if report["damaged"]:
        raise CheckpointError(
            f"{args.directory}: {len(report['damaged'])} damaged, {report['intact']} intact. Restore the damaged "
            "files from a copy, or delete them and rerun the command that wrote them (--resume auto, --overwrite)."
        )


def _text(report: dict[str, Any]) -> str:
    lines = [f"{report['directory']}: {report['what']}", f"{report['intact']} files intact"]
    if report["holder"]:
        holder = report["holder"]
        lines.append(
            f"process {holder['pid']} on {holder['host']} is still writing there, so some files may be incomplete"
        )
    if damaged := report["damaged"]:
        lines += ["", f"{len(damaged)} damaged:", *(f"  {one['problem']}" for one in damaged)]
    for key, title in (
        ("unfinished", "unfinished"),
        ("not_covered", "not covered by a manifest, so not checked"),
    ):
        if found := report[key]:
            more = [f"  … and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            lines += ["", f"{len(found)} {title}:", *(f"  {name}" for name in found[:_SHOWN]), *more]
    return "\n".join(lines)
