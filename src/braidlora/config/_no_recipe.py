"""What to say where a recipe is neither a file nor a built-in one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from braidlora.config._suggest import nearest
from braidlora.config._yaml import parse_scalar

_SUFFIXES = (".yaml", ".yml")
_SHOWN = 3  # files


def no_recipe(path: Path, built_in: Iterable[str]) -> str:
    """That there is no such file in its folder, and what was probably meant."""
    given, folder = str(path), path.expanduser().parent
    if not folder.is_dir():
        start = f"{given}: no such file; there is no folder {folder.absolute()}."
    elif path.suffix.lower() in _SUFFIXES:
        start = f"{given}: no such file in {folder.absolute()}."
    else:
        start = f"{given}: no such file in {folder.absolute()}, and no built-in recipe of this name."
    files = _similar_files(path.name, folder)
    near = nearest(given.removesuffix(path.suffix) if path.suffix.lower() in _SUFFIXES else given, built_in)
    hints = [f"Did you mean {' or '.join(files)}?"] if files else []
    if near:
        hints.append(f"{'Or d' if files else 'D'}id you mean the built-in recipe `{near}`?")
    if not _parses_as_number(given):
        hints += (
            []
            if hints
            else ["`braidlora recipes` lists the built-in recipes; `braidlora init DATA` writes one."]
        )
    else:
        hints.append("If it is the value of an override, write --key=value, with `=`.")
    return " ".join([start, *hints])


def _similar_files(name: str, folder: Path) -> list[str]:
    """Recipes in the folder with a similar name, as they would be given."""
    try:
        there = [one for one in os.listdir(folder) if one.lower().endswith(_SUFFIXES)]
    except OSError:
        return []
    stems = {one: os.path.splitext(one)[0].lower() for one in there}
    wanted = name.lower()
    wanted = os.path.splitext(wanted)[0] if wanted.endswith(_SUFFIXES) else wanted
    near = difflib.get_close_matches(wanted, set(stems.values()), n=_SHOWN, cutoff=0.6)
    found = [one for stem in near for one in sorted(there) if stems[one] == stem][:_SHOWN]
    return [one if str(folder) == "." else str(folder / one) for one in found]


def _parses_as_number(text: str) -> bool:
    return isinstance(parse_scalar(text), int | float)
