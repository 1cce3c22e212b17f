"""Advisory locks on open files, which the kernel releases when the process ends for any reason."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    # Windows blocks reads of a locked range, and the holder's record is at the start of the file.
    _FAR = 1 << 30

    def _lock(descriptor: int, *, shared: bool) -> None:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int, *, shared: bool) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed. False: it is locked already. None: the file system has no locks."""
    try:
        _lock(descriptor, shared=shared)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def is_locked(path: Path) -> bool:
    """Whether any process has the file or folder at `path` locked, including this one through another descriptor."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # removed, not readable, or a folder on Windows
        return False
    try:
        return try_lock(descriptor, shared=True) is False
    finally:
        os.close(descriptor)
