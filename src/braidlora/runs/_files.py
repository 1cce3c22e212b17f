"""Atomic files: written under a temporary name in the same folder, synced, and renamed."""

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
_KEPT = 40  # characters of the file's name in its temporary name; file systems allow 255 bytes


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; readers, and a crash at any moment, see the old or the new file."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            try_lock(file.fileno())  # marks the file as in use for cleanups
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":  # where an open file cannot be renamed
                os.replace(temporary, path)
        if os.name == "nt":
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are rejected, because JSON has no such numbers."""
    atomic_write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON. NaN and infinity are rejected, because JSON has no such numbers."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run; raises as `read_bytes`, or CheckpointError if it is not JSON."""
    return parse_json(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """The bytes of a file that a run wrote.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing. Is this the right directory?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None


def parse_json(path: Path, data: bytes) -> Any:
    """Parse `data`, which was read from `path`, as JSON.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return loads(data.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). The file is damaged.") from None


def temporary_name(path: Path) -> Path:
    """A hidden path next to `path` that no other process or call uses."""
    return path.with_name(f".{path.name[:_KEPT]}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def is_leftover(name: str) -> bool:
    """Whether this is the name of a partial file or folder."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path, *, below: bool = False) -> None:
    """Remove partial files and folders of killed processes from `folder`, and with `below` from its subfolders.

    Those that a live process is writing are kept: the process has them locked.
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
    """Remove a folder if it exists; links are not followed."""
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
    """Sync the entries of `directory` to disk."""
    if os.name == "nt":  # Windows cannot open a folder, and its renames are durable
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
