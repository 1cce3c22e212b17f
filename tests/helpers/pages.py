"""What a page of the docs tells its reader to do: files to write, commands to run, Python to run, in order."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

COMMANDS = "braidlora|make|python|pip|torchrun|accelerate|jupyter|source|printf|export|curl"
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(?:{COMMANDS})\b")
_FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]+)\")?\s*$")
_NOT_RUN = re.compile(r"<!-- not run: (.*?) -->", re.S)


@dataclass(frozen=True)
class Step:
    """One block.

    Attributes:
        kind: `file`, `commands`, `python`, or the language of a block that nothing is done with.
        text: its content, without indentation.
        line: its first line on the page.
        name: the file to write.
        not_run: why the block is not run; empty if it is.
    """

    kind: str
    text: str
    line: int
    name: str = ""
    not_run: str = ""


def steps(page: Path) -> list[Step]:
    """The fenced blocks of a page, and its indented blocks of commands."""
    lines = page.read_text(encoding="utf-8").split("\n")
    found: list[Step] = []
    reason, index = "", 0
    while index < len(lines):
        start, fence = index, _FENCE.match(lines[index])
        if fence:
            end = next(n for n in range(index + 1, len(lines)) if lines[n].strip() == "```")
            block, index = lines[index + 1 : end], end + 1
            kind = "file" if fence[3] else {"bash": "commands"}.get(fence[2], fence[2])
        elif _is_command(lines, index):
            end = next((n for n in range(index, len(lines)) if not lines[n].startswith("    ")), len(lines))
            block, index, kind = lines[index:end], end, "commands"
        else:
            if lines[index].lstrip().startswith("<!-- not run:"):
                text = "\n".join(lines[index : index + 4])
                reason = " ".join(_NOT_RUN.search(text)[1].split())
            elif lines[index].strip() and not lines[index].endswith("-->"):
                reason = ""
            index += 1
            continue
        text = textwrap.dedent("\n".join(block)) + "\n"
        found.append(Step(kind, text, start + 1, (fence and fence[3]) or "", reason))
        reason = ""
    return found


def commands(text: str) -> list[str]:
    """The command lines of a block, without comments; a backslash continues a line."""
    lines = text.replace("\\\n", " ").split("\n")
    return [
        line for line in (re.sub(r"\s+#.*$", "", line).strip() for line in lines) if line and line[0] != "#"
    ]


def _is_command(lines: list[str], index: int) -> bool:
    """Whether an indented block of commands starts here, after an empty line."""
    return (
        lines[index].startswith("    ")
        and (index == 0 or not lines[index - 1].strip())
        and _COMMAND.match(lines[index].strip()) is not None
    )
