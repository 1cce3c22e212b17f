"""Names that become file names: of tasks, of clients, of a comparison's rows."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST_NAME = 100  # file systems allow 255 bytes, and runs add to a name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
# Devices on Windows, with any ending.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def name_problem(name: str, allowed: re.Pattern[str] = _NAME) -> str | None:
    """What keeps `name` from being a file name on every system, or None."""
    if len(name) > LONGEST_NAME:
        return f"a name of {len(name)} characters; it becomes a file name, and at most {LONGEST_NAME} are allowed"
    if not allowed.fullmatch(name):
        return f"{name!r} becomes a file name; expected letters, digits, `_`, `-` and `.`, a letter or digit first"
    if name.endswith("."):
        return f"{name!r} becomes a file name, and Windows drops a dot at its end; leave it out"
    if _RESERVED.fullmatch(name):
        return f"{name!r} becomes a file name, and Windows keeps that one for a device; choose another"
    return None


def same_file(names: Iterable[str]) -> list[str]:
    """Names that stand for one file where upper and lower case are the same, sorted."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.lower(), []).append(name)
    return sorted(name for same in found.values() if len(same) > 1 for name in dict.fromkeys(same))
