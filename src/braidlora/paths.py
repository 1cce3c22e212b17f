"""Paths as people write them, and the folder of data sets and models that relative ones may lie in."""

from __future__ import annotations

import os
from pathlib import Path

from braidlora.errors import ConfigError

DATA_VARIABLE = "BRAIDLORA_DATA"


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` or `~name` replaced by that home folder.

    Raises:
        ConfigError: the home folder is unknown, or the path holds a null character.
    """
    if "\0" in str(path):
        raise ConfigError(f"{path}: a path cannot hold a null character.")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise ConfigError(
            f"{path}: the home folder {home} is unknown here. Write the full path, or ./{home} for a folder of that "
            "name."
        ) from None


def find_data(path: str | Path) -> Path:
    """Where data or a model lies: `path` itself, or else `$BRAIDLORA_DATA/path` if `path` is relative.

    A relative path starts at the working directory; what exists there is used first. If neither place exists, this
    returns `path`.

    Raises:
        ConfigError: as `expanded`.
    """
    places = data_places(path)
    return next((place for place in places if os.path.exists(place)), places[0])


def places_searched(path: str | Path) -> str:
    """What `find_data` has tried, for a message that `path` does not exist."""
    places = data_places(path)
    tried = " and ".join(str(Path(os.path.abspath(place))) for place in places)
    if len(places) > 1 or places[0].is_absolute():
        return f"looked for {tried}"
    return f"looked for {tried} ({DATA_VARIABLE}, the folder that holds data/ and models/, is not set)"


def data_places(path: str | Path) -> list[Path]:
    """The places at which `find_data` looks, in order."""
    written = expanded(path)
    folder = os.environ.get(DATA_VARIABLE)
    return [written] if written.is_absolute() or not folder else [written, expanded(folder) / written]
