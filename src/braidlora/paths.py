"""Paths as users write them, and the data folder that relative paths are resolved against."""

from __future__ import annotations

import difflib
import os
from glob import glob, has_magic
from pathlib import Path

from braidlora.errors import ConfigError

DATA_VARIABLE = "BRAIDLORA_DATA"
_SHOWN = 8  # names in a message


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


def missing(given: str) -> str:
    """That a file does not exist, where it was looked for, and what lies nearby."""
    if matches := _matching(given):
        shown = ", ".join(matches[:_SHOWN]) + (", …" if matches[_SHOWN:] else "")
        return (
            f"{given}: no such file. It is a pattern, and patterns are expanded by the shell alone: without quotes, it "
            f"stands for {shown}. In a recipe, name one file or folder for each part."
        )
    return f"{given}: no such file or folder; {places_searched(given)}. {nearby(given)}."


def nearby(given: str) -> str:
    """What lies where a file was looked for: similar names, or else what the folder has."""
    absent, folder = min(map(_first_absent, data_places(given)), key=lambda found: found[2])[:2]
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    known = sorted(name for name in names if not name.startswith("."))
    near = difflib.get_close_matches(absent.name, known, n=3, cutoff=0.5)
    if near:
        return f"Similar names in {folder.resolve()}: {', '.join(near)}"
    if known:
        return f"{folder.resolve()} has {', '.join(known[:_SHOWN])}{', …' if known[_SHOWN:] else ''}"
    return f"{folder.resolve()} is empty"


def _matching(given: str) -> list[str]:
    """The files that a shell would put in place of a pattern such as `*.csv`, in order."""
    return sorted(glob(given)) if has_magic(given) else []


def _first_absent(path: Path) -> tuple[Path, Path, int]:
    """The topmost part of `path` that does not exist, the folder in which it is missing, and the parts below it."""
    below = 0
    while not path.parent.exists():
        path, below = path.parent, below + 1
    return path, path.parent, below


def cache_folder(name: str = "") -> Path:
    """`$XDG_CACHE_HOME/braidlora/NAME`, or the same under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "braidlora" / name
