"""Pages, docstrings, comments and messages use plain American technical English.

The phrases below read like a translation, or use one word for two things. Each has a replacement.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "src" / "braidlora" / "recipes").rglob("*.yaml"))
CODE = [
    path
    for folder in ("src/braidlora", "scripts", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
PHRASES = {
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\b(wears?|wearing)\b": "load, activate",
    r"\b(heard|hears)\b": "received, receives",
    r"\blets? (up|down|through)\b": "uploads, broadcasts",
    r"\bcarr(y|ies|ied) on\b": "resume, continue",
    r"\b(goes|went|gone) on (from|after|with|until|as)\b": "continues, resumes",
    r"\blosing rows\b": "rows where a method loses",
    r"\bno difference (to|is seen|seen)\b|\bdifference to (any|LoRA|the)\b": "not significantly different from",
    r"\btold apart\b": "distinguished, significantly different",
    r"\btold otherwise\b|\b(is|are|was|were|not) told\b": "by default, given, reported",
    r"\basked (not )?to be\b|\basked (clients?|again)\b": "requested, sampled, retried",
    r"\bof no concern\b": "irrelevant",
    r"\b(is|are|stays?|stayed) as (it|they) (was|were)\b": "unchanged",
    r"\banew\b": "again, from scratch",
    r"\bbeside\b": "next to, along with, compared with",
    r"\b(is|are|not) whole\b|\bas a whole, or\b": "complete, intact, atomically",
    r"\bwhole (training|test) (sets?|rows?)\b": "full",
    r"\bfor want of\b": "without",
    r"\bper cent\b": "percent",
    r"\b(stands?|stood) (at|in(?! for)|there)\b": "is, lies",
    r"(?<!there )\bis no (adapter|checkpoint|run|number|rule|client|recipe|federation|folder|file)\b": "is not a",
    r"\bthe better part of\b": "most of",
    r"\b95% intervals?\b": "95% CI",
    r"\bswe(ep|pt) up\b": "delete",
    r"\brefus(e|es|ed)\b": "reject, raise an error",
    r"\b(stays?|stayed|keeps? \w+ \w+) at (its|the|a|their) clients?\b|\bat clients\b": "on the client",
    r"\b(to the|identical to the) bit\b": "bit-identical, bit for bit",
    r"\bdata sets?\b": "dataset",
    r"\bwhite space\b": "whitespace",
    r"\bcut short\b": "truncated",
    r"\bexclude each other\b": "cannot be combined",
    r"\b(hardly|noticeably) turn(s|ed)?\b|\bchange of direction:": "changes direction",
    r"\bwhere a method loses\b": "unfavorable results",
    r"\b(un)?learnt\b|\bbehaviour|\b[a-z]+alise[ds]?\b|\bquantise|\bserialise": "American spelling",
}
NAMES = {"mend", "wear", "heard", "told", "beside", "anew", "crew", "yardstick", "yardsticks"}


def prose_of_page(path: Path) -> Iterator[tuple[int, str]]:
    yield 1, path.read_text(encoding="utf-8")


def prose_of_code(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, messages and comments with their first line; blocks of comment lines as one text."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    last, first, block = -1, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1:
            yield first, block
            first, block = token.start[0], ""
        last, block = token.start[0], f"{block}\n{token.string}"
    yield first, block


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_phrase_that_a_native_reader_stumbles_over(path):
    found = []
    for line, text in (prose_of_code if path.suffix == ".py" else prose_of_page)(path):
        for phrase, instead in PHRASES.items():
            for match in re.finditer(re.sub(r"(?<!there) ", r"[\\s#]+", phrase), text, flags=re.I):
                number = line + text[: match.start()].count("\n")
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; write: {instead}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_that_a_native_reader_stumbles_over(path):
    source = path.read_text(encoding="utf-8")
    found = [
        f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}"
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NAME and NAMES & set(token.string.lower().split("_"))
    ]
    assert not found, "\n".join(found)
    assert not NAMES & set(path.stem.lower().split("_")), path
