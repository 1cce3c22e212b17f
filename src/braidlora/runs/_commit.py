"""Write folders atomically: a folder appears complete or not at all, and replaces an older one in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braidlora.runs._files import atomic_write_text, sync_directory, temporary_name
from braidlora.runs._flock import try_lock
from braidlora.runs._manifest import MANIFEST, entry_of_file, manifest_text
from braidlora.runs._names import MODEL_CARD

_NOT_LISTED = (MODEL_CARD,)  # users may edit a model card
_ASIDE = ".replaced"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # renameat2(2)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def commit_directory(target: Path) -> Iterator[Path]:
    """Write the folder `target` atomically.

    Yields a staging folder next to `target`. If the block ends without an exception, all files are synced to disk, the
    manifest (sha256 and size of every file except a README) is written last, and the staging folder replaces `target`;
    only then is an older `target` removed. On an exception the staging folder is removed and `target` is unchanged.
    """
    restore_replaced(target)
    staging = temporary_name(target)
    staging.mkdir(parents=True)
    try:
        with in_use(staging):
            yield staging
            finish_directory(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def in_use(staging: Path) -> Iterator[None]:
    """Mark the folder as being written by this process for the duration of the block, so that cleanups leave it."""
    descriptor = None if os.name == "nt" else os.open(staging, os.O_RDONLY)
    try:
        if descriptor is not None:
            try_lock(descriptor)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def finish_directory(staging: Path, target: Path) -> None:
    """Sync, write the manifest, and replace `target` with `staging`."""
    files = {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        entry = entry_of_file(path, sync=True)
        if path.name not in _NOT_LISTED:
            files[path.relative_to(staging).as_posix()] = entry
    for directory in [path for path in staging.rglob("*") if path.is_dir()]:
        sync_directory(directory)
    atomic_write_text(staging / MANIFEST, manifest_text(files))
    undo, old = _put_in_place(staging, target)
    try:
        sync_directory(target.parent)
    except OSError:
        undo()
        raise
    if old is not None:
        # The new folder is in place; a later cleanup removes what cannot be removed now.
        shutil.rmtree(old, ignore_errors=True)


def restore_replaced(target: Path) -> None:
    """Restore a folder that was set aside for a new one, if the process was killed before the new one was in place."""
    aside = _aside(target)
    if not aside.is_dir():
        return
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(aside, target)


def restore_all(folder: Path) -> None:
    """`restore_replaced` for everything in `folder`."""
    if folder.is_dir() and not folder.is_symlink():
        for entry in list(folder.iterdir()):
            if match := re.fullmatch(rf"\.(.+){re.escape(_ASIDE)}", entry.name):
                restore_replaced(folder / match[1])


def _put_in_place(staging: Path, target: Path) -> tuple[Callable[[], object], Path | None]:
    """Rename `staging` to `target`. Returns a function that undoes it, and the path of the older folder, if any."""
    if not target.exists():
        os.replace(staging, target)
        return lambda: os.replace(target, staging), None
    if exchange(staging, target):
        return lambda: exchange(staging, target), staging
    # rename() cannot replace a folder that is not empty. After a kill between the two renames below, the next start
    # restores the old folder.
    aside = _aside(target)
    os.replace(target, aside)
    try:
        os.replace(staging, target)
    except BaseException:
        os.replace(aside, target)
        raise

    def undo() -> None:
        os.replace(target, staging)
        os.replace(aside, target)

    return undo, aside


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically. False if the operating system or the file system does not support that.

    Raises:
        OSError: the swap is supported, but failed.
    """
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _renameat2() -> Any:
    """glibc's renameat2, or None on another system or with a C library that lacks it."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}{_ASIDE}")
