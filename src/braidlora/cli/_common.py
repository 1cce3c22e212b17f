"""Helpers that the verbs share: declaring a verb, renaming an option, printing JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.errors import DataError
from braidlora.terminal import json_printable, say

if TYPE_CHECKING:
    from braidlora.config import RunConfig


def verb(
    verbs: Any, name: str, run: Callable[..., Any], text: str, *, overrides: bool = True
) -> argparse.ArgumentParser:
    suffix = " Override any recipe key with --dotted.key=value." if overrides else ""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.{suffix}", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, takes_overrides=overrides)
    return parser


class _OldName(argparse.Action):
    """The former name of an option: prints a note and does what the new one does."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, now: argparse.Action, spelled: Mapping[str, str]
    ) -> None:
        kind: Any = now.type
        super().__init__(
            option_strings,
            dest,
            nargs=now.nargs,
            type=kind,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        self.now, self.spelled = now, spelled
        if spelled:
            self.nargs, self.choices = None, tuple(spelled)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        new = self.spelled[values] if self.spelled else self.now.option_strings[0]
        old = f"{option} {values}" if self.spelled else option
        say(f"{parser.prog}: warning: {old} is deprecated; use {new}.", file=sys.stderr)
        self.now(parser, namespace, values, new)


def old_name(
    parser: argparse.ArgumentParser, name: str, now: argparse.Action, spelled: Mapping[str, str] | None = None
) -> None:
    """Keep `name` as a hidden alias of the option `now` for one version.

    `spelled` maps the values of an option that has become a flag to the flag's spellings.
    """
    parser.add_argument(name, dest=now.dest, action=_OldName, now=now, spelled=spelled or {})


def rows_here(name: str) -> None:
    """Raise DataError if a file of rows is missing, before the heavy imports; `-` is standard input."""
    from braidlora.config import SUFFIXES
    from braidlora.paths import find_data, missing

    if name != "-" and Path(name).suffix.lower() in (*SUFFIXES, ".txt") and not find_data(name).exists():
        raise DataError(missing(name))


def recipe_here(given: str, overrides: Sequence[str]) -> RunConfig:
    """The recipe of a training; what is wrong with it, and a file that it names and that is missing, shows at once.

    Raises:
        ConfigError, DataError: as `load_config`, or as reading the rows would raise.
    """
    from braidlora.config import load_config

    config = load_config(given, overrides)
    for task in config.tasks:
        for part in (task.train, task.validation, task.test):
            if (
                part is not None
                and part.format is None
                and not part.source.startswith(("data:", "generated:"))
            ):
                rows_here(part.source)
    return config


def load_call(folder: str | Path) -> str:
    """The call that loads an adapter folder with PEFT, after `import braidlora` if its type needs it.

    A classifier's base must be loaded with the right number of labels first, so its README.md is named instead.
    """
    from braidlora.models.model_card import needs_import
    from braidlora.runs import ADAPTER_CONFIG

    path = Path(folder) / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    readme = Path(folder) / "README.md"
    if config.get("task_type") == "SEQ_CLS" and readme.is_file():
        return f"the code in {readme}"
    return f"{'import braidlora; ' * needs_import(config)}PeftModel.from_pretrained(base, '{folder}')"


def print_json(value: Any) -> None:
    print(json_printable(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False)))
