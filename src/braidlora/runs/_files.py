"""Files that are whole or absent: written beside their place under a name of their own, synced, renamed."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError
from braidlora.json_text import loads
from braidlora.runs._flock import is_locked, try_lock

PARTIAL = ".partial"
_LEFTOVER = re.compile(r"\..+\.partial")
_KEPT = 40  # characters of a file's name that its temporary name repeats; a name has 255 bytes at most


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) so that a reader, or a crash at any moment, sees the old or the new file."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            try_lock(file.fileno())  # tells a cleanup that this file is in use
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":  # there an open file cannot be renamed
                os.replace(temporary, path)
        if os.name == "nt":
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused, since JSON has no such numbers."""
    atomic_write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as this package writes JSON. NaN and infinity are refused, since JSON has no such numbers."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        CheckpointError: the file is missing, unreadable or no JSON.
    """
    try:
        return parse_json(path, path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing. A run writes this file; is this the right directory?"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). The file is damaged.") from None


def parse_json(path: Path, data: bytes) -> Any:
    """`data`, which was read from `path`, as JSON.

    Raises:
        CheckpointError: it is no JSON.
    """
    try:
        return loads(data.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). The file is damaged.") from None


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process and no other call uses."""
    return path.with_name(f".{path.name[:_KEPT]}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is something half written."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Remove what a killed process left half written in `folder`, and with `below` in the folders under it.

    What a live process is writing stays: it holds a lock on each such file and folder.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in folder.iterdir():
        if is_leftover(entry.name):
            if not is_locked(entry):
                remove_tree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        elif below:
            remove_leftovers(entry, below=True)


def remove_tree(path: Path) -> None:
    """Remove a folder if it is there; a link is never followed."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def remove_at_once(folder: Path) -> None:
    """Remove a folder in one step: a kill leaves it as it was, or a leftover that the next start removes."""
    aside = temporary_name(folder)
    os.replace(folder, aside)
    remove_tree(aside)


def sync_directory(directory: Path) -> None:
    """Have the names in `directory` reach the disk."""
    if os.name == "nt":  # Windows cannot open a folder; its rename is durable by itself
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
