"""Names that become file names: of tasks, of clients, and of the rows of a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST_NAME = 100  # file systems allow 255 bytes, and runs append to the name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
# Device names of Windows, with any suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def name_problem(name: str, allowed: re.Pattern[str] = _NAME) -> str | None:
    """Why `name` is not a valid file name on every system, or None."""
    if len(name) > LONGEST_NAME:
        return f"a name of {len(name)} characters becomes a file name; at most {LONGEST_NAME} are allowed"
    if not allowed.fullmatch(name):
        return (
            f"{name!r} becomes a file name; expected letters, digits, `_`, `-`, `.`; a letter or digit first"
        )
    if name.endswith("."):
        return f"{name!r} becomes a file name, and Windows drops a final dot; remove it"
    if _RESERVED.fullmatch(name):
        return f"{name!r} becomes a file name, which Windows reserves for a device; choose another name"
    return None


def same_file(names: Iterable[str]) -> list[str]:
    """Names that are one file on a case-insensitive file system, sorted."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.lower(), []).append(name)
    return sorted(name for same in found.values() if len(same) > 1 for name in dict.fromkeys(same))
