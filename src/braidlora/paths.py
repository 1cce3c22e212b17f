"""Paths as users write them, and the data folder that relative paths are resolved against."""

from __future__ import annotations

import os
from pathlib import Path

from braidlora.errors import ConfigError

DATA_VARIABLE = "BRAIDLORA_DATA"


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` or `~name` replaced by that home folder.

    Raises:
        ConfigError: the home folder is unknown, or the path contains a null character.
    """
    if "\0" in str(path):
        raise ConfigError(f"{path}: a path cannot contain a null character.")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise ConfigError(
            f"{path}: the home folder {home} is unknown. Write the full path, or ./{home} for a folder with that "
            "name."
        ) from None


def find_data(path: str | Path) -> Path:
    """Location of data or a model: `path` if it exists, otherwise `$BRAIDLORA_DATA/path` for a relative `path`.

    If neither exists, this returns `path`, relative to the working directory.

    Raises:
        ConfigError: as `expanded`.
    """
    places = data_places(path)
    return next((place for place in places if os.path.exists(place)), places[0])


def places_searched(path: str | Path) -> str:
    """The locations that `find_data` tried, for an error message."""
    places = data_places(path)
    tried = " and ".join(str(Path(os.path.abspath(place))) for place in places)
    if len(places) > 1 or places[0].is_absolute():
        return f"looked for {tried}"
    return f"looked for {tried} ({DATA_VARIABLE}, the folder that holds data/ and models/, is not set)"


def data_places(path: str | Path) -> list[Path]:
    """The locations that `find_data` tries, in order."""
    written = expanded(path)
    folder = os.environ.get(DATA_VARIABLE)
    return [written] if written.is_absolute() or not folder else [written, expanded(folder) / written]


def cache_folder(name: str = "") -> Path:
    """`$XDG_CACHE_HOME/braidlora/NAME`, or the same under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "braidlora" / name
