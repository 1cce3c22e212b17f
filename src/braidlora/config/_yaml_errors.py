"""What is wrong with a YAML text, in plain words: the parser's own messages name its grammar, not the mistake."""

from __future__ import annotations

import re
from typing import Any

_KEY = re.compile(r"\s*(?:- +)?[^\s:#][^:]*:(?:\s|$)")
_WORD_COLON = re.compile(r"\s*(?:- +)?([\w.]+):(\S)")


def plain_words(error: Any, text: str) -> tuple[str, int | None]:
    """The message for a `MarkedYAMLError` of ruamel.yaml, and the line (from 1) on which to look.

    Args:
        error: what the parser raised.
        text: the text that it parsed.
    """
    lines = text.split("\n")
    mark, begun = error.problem_mark or error.context_mark, error.context_mark
    problem = error.problem or str(error).split("\n")[0]
    if mark is None:
        return problem, None
    at = min(mark.line, len(lines) - 1)
    line = lines[at]
    if "mapping values are not allowed" in problem:
        return _colon(lines, at, mark.column)
    if "'\\t'" in problem or (line.lstrip(" ").startswith("\t")):
        return "a tab indents this line. Use spaces instead of tabs", at + 1
    if found := re.search(r"character '(.)' that cannot start any token", problem):
        return f"a value cannot start with {found[1]}. If it is text, put it in quotes", at + 1
    if "unknown escape character" in problem:
        return (
            "a backslash in \"double quotes\" begins an escape, and this one is unknown. Use 'single quotes' for "
            "paths and patterns",
            at + 1,
        )
    if "expected ':'" in problem and begun is not None:
        start = min(begun.line, len(lines) - 1)
        return f"{lines[start].strip()[:60]!r} has no colon. Write `key: value`", start + 1
    if "unexpected end of stream" in problem and begun is not None:
        return "a quote is opened here and never closed", begun.line + 1
    if (closing := re.search(r"expected ',' or '([\]}])'", problem)) and begun is not None:
        kind, opening = ("list", "[") if closing[1] == "]" else ("mapping", "{")
        return f"the {kind} that begins here with {opening} is not closed with {closing[1]}", begun.line + 1
    if "expected <block end>" in problem:
        return _block_end(problem, line, at)
    plain = re.sub(r"\('(.)',\)", r"'\1'", problem)  # the parser shows some tokens as a tuple
    return f"{plain} (column {mark.column + 1})", at + 1


def _colon(lines: list[str], at: int, column: int) -> tuple[str, int]:
    """A `: ` where no key may stand: in a value, below a value, or below a line that lacks its colon."""
    line = lines[at]
    before = line[:column].strip().removeprefix("- ")
    if ": " in before:
        return "a value with a colon and a space in it must be quoted, as in key: 'a: b'", at + 1
    above = next((n for n in range(at - 1, -1, -1) if lines[n].strip(" ") and not _comment(lines[n])), None)
    if above is None:
        return "a colon is not expected here", at + 1
    earlier = lines[above]
    if found := _WORD_COLON.match(earlier):
        return (
            f"a space is missing after the colon of {found[1]!r}. Write `{found[1]}: {found[2]}…`",
            above + 1,
        )
    if re.match(r"\s*-[^\s-]", earlier):
        return "a space is missing after the dash of this list item. Write `- name: …`", above + 1
    if not _KEY.match(earlier):
        return (
            f"{earlier.strip()[:60]!r} has no colon. Write `key: value`, or `key:` above a section",
            above + 1,
        )
    if _indent(line) > _indent(earlier):
        return (
            f"this line is indented more than the line above, which already has a value. Indent all keys of "
            f"a section equally ({_indent(earlier)} spaces)",
            at + 1,
        )
    return "a colon is not expected here; a value with a colon and a space in it must be quoted", at + 1


def _block_end(problem: str, line: str, at: int) -> tuple[str, int]:
    if found := re.search(r"found '([\]}])'", problem):
        return f"a {found[1]} has no opening bracket. Remove it, or quote the value", at + 1
    if "'<scalar>'" in problem:
        return "text follows a closed quote. Put quotes around the entire value", at + 1
    if line.strip().startswith("-"):
        return (
            "a list item where a key is expected. Indent all items of a list equally, below their key",
            at + 1,
        )
    return (
        "this line's indentation matches no line above. Indent all keys of a section equally, and the keys of a list "
        "item as far as its first key",
        at + 1,
    )


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _comment(line: str) -> bool:
    return line.lstrip().startswith("#")
