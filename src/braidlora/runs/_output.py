"""Where each verb writes: `train` to the recipe's `output`, the others next to it, so that they do not collide."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from braidlora.paths import expanded
from braidlora.runs._directory import RunDirectory
from braidlora.runs._federated import FederatedDirectory

COMPARISON_RECIPE, COMPARISON, CELLS = "recipe.yaml", "comparison.json", "cells"


def output_of(
    output: str, verb: Literal["compare", "federate", "advise"], overrides: Iterable[str] = ()
) -> str:
    """The folder that `verb` writes to for a recipe with this `output`.

    An `output` given as an override is taken as it is. A comparison or federation that an earlier version wrote to
    `output` itself is continued there.

    Args:
        output: of the recipe, with overrides applied.
        verb: `compare` writes to OUTPUT-compare, `federate` to OUTPUT-federate, `advise` to OUTPUT-advise.
        overrides: `dotted.key=value` as given on the command line.
    """
    if any(override.removeprefix("--").partition("=")[0] == "output" for override in overrides):
        return output
    own = f"{output.rstrip('/')}-{verb}"
    if not expanded(own).exists() and _holds(expanded(output), verb):
        return output
    return own


def comparison_cells(folder: Path) -> list[str] | None:
    """The names of a comparison's runs, or None if `folder` is not a comparison."""
    cells = folder / CELLS
    if not folder.is_dir() or RunDirectory(folder).config.is_file():
        return None
    if not cells.is_dir() and not (folder / COMPARISON).is_file():
        return None
    return sorted(one.name for one in cells.iterdir() if one.is_dir()) if cells.is_dir() else []


def _holds(folder: Path, verb: str) -> bool:
    if verb == "compare":
        return (folder / COMPARISON_RECIPE).is_file() and (folder / CELLS).is_dir()
    if verb == "advise":
        return False  # it never wrote to `output`
    return folder.is_dir() and FederatedDirectory(folder).state() in ("started", "resumable", "finished")
