"""Write docs/reference/commands.md from the command line's own help.

python scripts/document_commands.py          # writes
python scripts/document_commands.py --check  # exits with 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from braidlora.cli import build_parser

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "commands.md"
INTRODUCTION = """\
# Commands

Generated from `braidlora COMMAND --help`. Every command that takes a recipe also takes overrides: any key of the recipe
by its dotted name, as in `--training.learning_rate=1e-4`. Quote an override that contains `*` or `[`, because shells
expand them: `'--tasks.*.train.limit=50'`. Results go to stdout, progress and warnings to stderr; `--json` prints the
result as JSON.

"""


def page() -> str:
    parts = [INTRODUCTION, "| command | purpose |\n|---|---|\n"]
    verbs = list(_verbs(build_parser()))
    parts += [f"| [`{name}`](#{name.replace(' ', '-')}) | {about} |\n" for name, about, _ in verbs]
    for name, about, parser in verbs:
        parts.append(f"\n## {name}\n\n{_sentence(about)}\n\n    {_usage(name, parser)}\n\n")
        shown = [
            action
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
            if action.help is not argparse.SUPPRESS
        ]
        if shown:
            parts.append("| argument | meaning |\n|---|---|\n")
        parts += [f"| {_name(action)} | {_escape(_help(parser, action))} |\n" for action in shown]
    parts.append("\n[Exit codes](../exit-codes.md) are listed on a separate page.\n")
    return "".join(parts)


def _verbs(
    parser: argparse.ArgumentParser, prefix: str = ""
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                yield prefix + name, about.get(name, inner.description or ""), inner
                yield from _verbs(inner, f"{prefix}{name} ")


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [f"braidlora {name}"]
    words += [
        action.metavar or action.dest.upper() for action in parser._actions if not action.option_strings
    ]
    options = any(action.option_strings for action in parser._actions)
    return " ".join([*map(str, words), *(["[OPTIONS]"] if options else [])])


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest.upper()}`"
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
        value = f" {action.metavar or choices}"
    return ", ".join(f"`{option}{value}`".replace("|", "\\|") for option in action.option_strings)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    wanted = page()
    if not parser.parse_args().check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != wanted:
        sys.exit("docs/reference/commands.md is out of date. Run: python scripts/document_commands.py")


if __name__ == "__main__":
    main()
