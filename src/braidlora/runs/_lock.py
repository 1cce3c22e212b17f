"""One writer at a time: an advisory lock on a directory, held for as long as a command writes into it.

The lock is the kernel's (flock), on a file in the directory that names its holder, so it is released however the
process ends, also by a kill or a power cut. It covers the directory and everything below it: whoever wants to write
further down looks for locks further up. Processes that the holder started as its workers write under its lock.

On a file system without locks a warning is all that can be had. On NFS flock works between machines since Linux 2.6.12,
unless it is mounted with `local_lock`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError, TrainingError
from braidlora.json_text import loads
from braidlora.runs._flock import try_lock

LOCK = ".braidlora.lock"
_TRIES, _PAUSE = 4, 0.05  # somebody who only looks whether it is locked has it for a moment
_RACES = 50


@dataclass
class _Held:
    descriptor: int
    thread: int
    count: int = 1


_held: dict[str, _Held] = {}
_guard = threading.Lock()


@contextmanager
def hold(directory: Path, *, beside: bool = False, instead: str = "--output=PATH") -> Iterator[None]:
    """Be the only process that writes below `directory` for as long as the block lasts.

    The directory is made where it is missing, and removed again if nothing was written there. A holder may enter
    again. Of the processes that torchrun starts the first one holds the lock, since it alone writes.

    Args:
        directory: where the command writes.
        beside: put the lock beside the directory, because the directory itself is going to be replaced.
        instead: the option that chooses another place, for the message.

    Raises:
        CheckpointError: another process writes there; names its pid and host.
        TrainingError: the directory cannot be written.
    """
    if int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    folder = directory.parent if beside else directory
    name = f".{directory.name}{LOCK}" if beside else LOCK
    made: list[Path] = []
    try:
        path = _enter(folder, name, directory, instead, made)
    except OSError as error:
        _remove_empty(made)
        raise TrainingError(
            f"{error.filename or directory}: cannot be written: {error.strerror or error}. Free space on that disk or "
            f"make it writable, or choose another folder ({instead})."
        ) from error
    except BaseException:
        _remove_empty(made)
        raise
    try:
        yield
    finally:
        _leave(path)
        _remove_empty(made)


def holder_of(directory: Path) -> dict[str, Any] | None:
    """Who holds the lock of `directory`, as `{"pid", "host", "command", "since"}`; None where nobody does."""
    return _holder(directory / LOCK)


def is_lock(name: str) -> bool:
    """Whether a file of this name is a lock."""
    return name.startswith(".") and name.endswith(LOCK)


def _enter(folder: Path, name: str, directory: Path, instead: str, made: list[Path]) -> str:
    path, beside = os.path.join(os.path.realpath(folder), name), name != LOCK
    with _guard:
        held = _held.get(path)
        if held is not None and held.thread == threading.get_ident():
            held.count += 1
            return path
    _refuse_below_another(Path(path).parent, directory, instead, itself=beside)
    for _ in range(_TRIES):
        descriptor = _open(path, made)
        locked = try_lock(descriptor)
        if locked is None:
            warnings.warn(
                f"{directory}: this file system has no locks, so nothing keeps a second process from writing there "
                "at the same time.",
                stacklevel=4,
            )
        if locked is not False:
            # Whoever held it before may have removed the file between the opening and the locking.
            if _same_file(descriptor, path):
                with _guard:
                    _held[path] = _Held(descriptor, threading.get_ident())
                _write_holder(path, descriptor)
                return path
            os.close(descriptor)
            continue
        os.close(descriptor)
        holder = _holder(Path(path))
        if holder is not None and _is_parent(holder):
            return ""
        time.sleep(_PAUSE)
    raise _in_use(directory, _read_holder(Path(path)), instead)


def _leave(path: str) -> None:
    with _guard:
        held = _held.get(path)
        if held is None:  # under the parent's lock, or in a fork, where the lock stays with the parent
            return
        held.count -= 1
        if held.count:
            return
        del _held[path]
    if os.name != "nt":
        with contextlib.suppress(OSError):
            os.unlink(path)
    os.close(held.descriptor)
    if os.name == "nt":  # an open file cannot be removed there
        with contextlib.suppress(OSError):
            os.unlink(path)


def _open(path: str, made: list[Path]) -> int:
    """Open the lock's file, and make the folders that are missing; `made` gets them, the deepest first."""
    for last in (*[False] * _RACES, True):
        try:
            missing = [Path(path).parent]
            while not missing[-1].exists():
                missing.append(missing[-1].parent)
            for folder in reversed(missing[:-1]):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    made.insert(0, folder)
            return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # another process has just removed the folders that it had made
            if last:
                raise
    raise AssertionError("unreachable")


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):  # there is something in it
            folder.rmdir()


def _refuse_below_another(folder: Path, directory: Path, instead: str, *, itself: bool) -> None:
    """Refuse where another process holds a folder above `folder`, or with `itself` that one."""
    for above in ([folder] if itself else []) + list(folder.parents):
        lock = above / LOCK
        if str(lock) in _held or not lock.is_file():
            continue
        holder = _holder(lock)
        if holder is not None and not _is_parent(holder):
            raise _in_use(directory, holder, instead)


def _holder(lock: Path) -> dict[str, Any] | None:
    """Who holds the lock in this file; None where nobody does."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _read_holder(lock) if try_lock(descriptor, shared=True) is False else None
    finally:
        os.close(descriptor)


def _read_holder(lock: Path) -> dict[str, Any]:
    try:
        found = loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it has not written its name yet
        found = None
    unknown = {"pid": "unknown", "host": "an unknown host", "command": "", "since": ""}
    return {**unknown, **found} if isinstance(found, dict) else unknown


def _write_holder(path: str, descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:400],
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(holder).encode())
    except OSError:
        _leave(path)
        raise


def _same_file(descriptor: int, path: str) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _is_parent(holder: dict[str, Any]) -> bool:
    """Whether the holder started this process as a worker."""
    parent = multiprocessing.parent_process()
    return parent is not None and (holder["pid"], holder["host"]) == (parent.pid, socket.gethostname())


def _in_use(directory: Path, holder: dict[str, Any], instead: str) -> CheckpointError:
    since = f" since {holder['since']}" if holder["since"] else ""
    what = f" (`{holder['command']}`)" if holder["command"] else ""
    return CheckpointError(
        f"{directory}: process {holder['pid']} on {holder['host']}{what} has been writing there{since}; wait until it "
        f"ends, or choose another folder with {instead}."
    )


def _forget() -> None:
    """In a fork: the locks are the parent's, and are not to outlive it because a child has the file open."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
