"""One writer at a time: an advisory lock on a directory, held while a command writes to it.

The lock is a kernel lock (flock) on a file in the directory that names its holder, so it is released when the process
ends for any reason, including a kill or a power cut. It covers the directory and everything below it: a command also
checks for locks of the folders above. Worker processes of the holder write under its lock.

On a file system without locks there is only a warning. On NFS, flock works across machines from Linux 2.6.12 on, unless
mounted with `local_lock`.
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

from braidlora.errors import CheckpointError, explain_write_failures
from braidlora.json_text import loads
from braidlora.runs._flock import try_lock

LOCK = ".braidlora.lock"
_TRIES, _PAUSE = 4, 0.05  # a process that only checks the lock holds it for a moment
_RACES = 50


@dataclass
class _Held:
    descriptor: int
    thread: int
    count: int = 1


_held: dict[str, _Held] = {}
_employers: list[tuple[int, str]] = []
_guard = threading.Lock()


@contextmanager
def hold(
    directory: Path, *, adjacent: bool = False, instead: str = "choose another folder with --output=PATH"
) -> Iterator[None]:
    """Hold the lock on `directory` for the duration of the block.

    The directory is created if missing, and removed again if it stays empty. The lock is reentrant. Of the processes
    that torchrun starts, only the first one takes the lock, because only it writes.

    Args:
        directory: where the command writes.
        adjacent: put the lock file next to the directory, because the directory itself will be replaced.
        instead: what else the user can do, for the message.

    Raises:
        CheckpointError: another process is writing there; names its pid and host.
        TrainingError: the directory is not writable.
    """
    if int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    folder = directory.parent if adjacent else directory
    name = f".{directory.name}{LOCK}" if adjacent else LOCK
    made: list[Path] = []
    try:
        with explain_write_failures(directory, f"or {instead}"):
            path = _enter(folder, name, directory, instead, made)
    except BaseException:
        _remove_empty(made)
        raise
    try:
        yield
    finally:
        _leave(path)
        _remove_empty(made)


def holder_of(directory: Path) -> dict[str, Any] | None:
    """The holder of the lock on `directory` as `{"pid", "host", "command", "since"}`; None if it is not locked."""
    return _holder(directory / LOCK)


def is_lock(name: str) -> bool:
    """Whether this is the name of a lock file."""
    return name.startswith(".") and name.endswith(LOCK)


def _enter(folder: Path, name: str, directory: Path, instead: str, made: list[Path]) -> str:
    path = os.path.join(os.path.realpath(folder), name)
    with _guard:
        held = _held.get(path)
        if held is not None and held.thread == threading.get_ident():
            held.count += 1
            return path
    _refuse_below_another(Path(path).parent, directory, instead, itself=name != LOCK)
    for _ in range(_TRIES):
        descriptor = _open(path, made)
        locked = try_lock(descriptor)
        if locked is None:
            warnings.warn(
                f"{directory}: this file system has no locks, so nothing prevents a second process from writing there "
                "at the same time.",
                stacklevel=4,
            )
        if locked is not False:
            # The previous holder may have removed the file between opening and locking.
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
        if held is None:  # under the parent's lock, or in a fork, where the lock is the parent's
            return
        held.count -= 1
        if held.count:
            return
        del _held[path]
    if os.name != "nt":
        with contextlib.suppress(OSError):
            os.unlink(path)
    os.close(held.descriptor)
    if os.name == "nt":  # where an open file cannot be removed
        with contextlib.suppress(OSError):
            os.unlink(path)


def _open(path: str, made: list[Path]) -> int:
    """Open the lock file and create missing folders, which are added to `made`, the deepest first."""
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
        except FileNotFoundError:  # another process has just removed the folders that it had created
            if last:
                raise
    raise AssertionError("unreachable")


def _remove_empty(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _refuse_below_another(folder: Path, directory: Path, instead: str, *, itself: bool) -> None:
    """Raise if another process holds the lock of a folder above `folder`, or with `itself` of `folder`."""
    for above in ([folder] if itself else []) + list(folder.parents):
        lock = above / LOCK
        if str(lock) in _held or not lock.is_file():
            continue
        holder = _holder(lock)
        if holder is not None and not _is_parent(holder):
            raise _in_use(directory, holder, instead)


def _holder(lock: Path) -> dict[str, Any] | None:
    """The holder of this lock file; None if it is not locked."""
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
    except (OSError, ValueError):  # the holder has not written its record yet
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


@contextmanager
def working_for(holder: dict[str, Any]) -> Iterator[None]:
    """Write under another process's locks in this block: `{"pid", "host"}` of the process that gave out the work.

    For workers that are not its children, as on another machine.
    """
    _employers.append((holder["pid"], holder["host"]))
    try:
        yield
    finally:
        _employers.pop()


def _is_parent(holder: dict[str, Any]) -> bool:
    """Whether the holder started this process as a worker, or gave it the work."""
    if (holder["pid"], holder["host"]) in _employers:
        return True
    parent = multiprocessing.parent_process()
    return parent is not None and (holder["pid"], holder["host"]) == (parent.pid, socket.gethostname())


def _in_use(directory: Path, holder: dict[str, Any], instead: str) -> CheckpointError:
    since = f" since {holder['since']}" if holder["since"] else ""
    what = f" (`{holder['command']}`)" if holder["command"] else ""
    return CheckpointError(
        f"{directory}: process {holder['pid']} on {holder['host']}{what} has been writing there{since}; wait for it to "
        f"finish, or {instead}."
    )


def _forget() -> None:
    """In a fork: close the parent's lock files, so that its locks do not outlive it in the child."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
