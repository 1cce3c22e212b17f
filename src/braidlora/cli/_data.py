"""`braidlora data`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import print_json, verb
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.catalog import DataFile, DataSet

_HERE = {"folder": "BRAIDLORA_DATA", "cache": "cache"}


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "data",
        _run,
        "list, download and locate the datasets that recipes name by key",
        overrides=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, text, help_of_key in (
        ("list", "list the datasets and where their files are", "show only keys that begin with this"),
        ("fetch", "download the files of datasets", "a key, or a group of keys such as flan8"),
        (
            "where",
            "show where the files of datasets are, or would come from",
            "a key, or a group of keys such as flan8",
        ),
    ):
        sub = actions.add_parser(
            action, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        sub.add_argument("keys", nargs="*" if action == "list" else "+", metavar="KEY", help=help_of_key)
        sub.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON"
        )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.catalog import data_file, fetch

    sets = _chosen(args.keys)
    if args.action == "fetch":
        for one in sets:
            for name in _files(one):
                fetch(data_file(name), one.key)
    listed = {one.key: _described(one) for one in sets}
    if args.json:
        print_json(listed)
    elif args.action == "list":
        _list(listed)
    else:
        _where(listed)


def _chosen(keys: Iterable[str]) -> list[DataSet]:
    """The datasets of these keys and groups; all without any."""
    from braidlora.catalog import data_set, data_sets

    known, chosen = data_sets(), {}
    for key in keys:
        group = [one for one in known if one == key or one.startswith(f"{key.rstrip('/')}/")]
        chosen.update({one: known[one] for one in group} or {key: data_set(key)})
    return list((chosen or known).values())


def _files(one: DataSet) -> list[str]:
    return list(dict.fromkeys(part.file for part in one.parts.values()))


def _described(one: DataSet) -> dict[str, Any]:
    from braidlora.catalog import data_file

    parts = {
        name: {**_file(data_file(part.file)), "where": dict(part.where)} for name, part in one.parts.items()
    }
    return {"about": one.about, "parts": parts}


def _file(file: DataFile) -> dict[str, Any]:
    from braidlora.catalog import cached_place, data_file, find

    found = find(file)
    return {
        "file": file.name,
        "path": str(found.path) if found is not None else None,
        "found": _HERE[found.how] if found is not None else None,
        "cache": str(cached_place(file)),
        "origin": file.origin,
        "urls": [one.url for one in (file, *map(data_file, file.inputs)) if one.url],
        "bytes": file.size,
        "sha256": file.sha256,
        "git_blob": file.git_blob,
        "license": file.license,
    }


def _list(listed: dict[str, dict[str, Any]]) -> None:
    width = max(map(len, listed))
    for key, one in listed.items():
        places = dict.fromkeys(part["found"] or part["origin"] for part in one["parts"].values())
        say(
            f"{key:<{width}}  {', '.join(one['parts']):<11}  {', '.join(places):<14}  {one['about']}".rstrip()
        )


def _where(listed: dict[str, dict[str, Any]]) -> None:
    for key, one in listed.items():
        for part, facts in one["parts"].items():
            rows = f" (rows with {facts['where']})" if facts["where"] else ""
            if facts["path"] is not None:
                say(f"{key} {part}: {facts['path']}{rows}, from {facts['found']}")
            elif facts["urls"]:
                how = "made from" if facts["origin"] == "build" else "from"
                say(
                    f"{key} {part}: not on this machine; would be stored as {facts['cache']}, {how} "
                    f"{', '.join(facts['urls'])}"
                )
            else:
                say(
                    f"{key} {part}: not on this machine and not published; put {facts['file']} into BRAIDLORA_DATA"
                )
