"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from braidlora.errors import ConfigError


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` or `~name` as the home folder that it stands for.

    Raises:
        ConfigError: there is no such home folder, or no system has such a path.
    """
    if "\0" in str(path):
        raise ConfigError(f"{path}: a path cannot hold a character of code 0.")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise ConfigError(
            f"{path}: {home} stands for a home folder, and none is known here. Write the path in full, or as ./{home} "
            "if a folder of that name is meant."
        ) from None
