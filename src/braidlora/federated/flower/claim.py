"""What one `site serve` or `site join` has for itself: its folder, and a port. Both are checked before all else."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from braidlora.errors import CheckpointError, ConfigError
from braidlora.runs import hold, holder_of, is_lock

_PATIENCE = 15.0  # seconds that programs of a command that was killed may take to end
_LOOK = 0.2


@contextlib.contextmanager
def claim(folder: Path, host: str, port: int, file: str, done: str) -> Iterator[None]:
    """Have a server's or a site's folder and its port for oneself for the duration of the block.

    Args:
        folder: for Flower's own files; created if it is missing.
        host, port: where a program will listen.
        file: the settings that name the port, for messages.
        done: what another command has done with the folder, for messages: `joined` or `served`.

    Raises:
        CheckpointError: another command has the folder.
        ConfigError: the port is in use, or cannot be listened on; or the folder cannot be created.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: this folder cannot be created: {error.strerror}.") from None
    holder = holder_of(folder)
    if holder is not None:
        raise CheckpointError(
            f"{folder.parent}: {done} already, by process {holder['pid']} on {holder['host']}; stop that one first."
        )
    # A lock that nobody holds is left of a command that was killed, whose programs may still be ending.
    patience = _PATIENCE if any(is_lock(path.name) for path in folder.iterdir()) else 0.0
    with hold(folder, instead="stop it"):
        check_port(host, port, file, patience)
        yield


def check_port(host: str, port: int, file: str, patience: float = 0.0) -> None:
    """Reject a port that another program listens on.

    Args:
        host: an address or a name of this machine.
        file: the settings that name them, for messages.
        patience: seconds to wait for it.

    Raises:
        ConfigError: what to change.
    """
    end = time.monotonic() + patience
    while (problem := _problem(host, port, file)) is not None:
        if not problem[1] or time.monotonic() >= end:
            raise ConfigError(problem[0])
        time.sleep(_LOOK)


def _problem(host: str, port: int, file: str) -> tuple[str, bool] | None:
    """What keeps a program from listening there, and whether that may pass."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        return f"{file}: host: {host} cannot be resolved; give an address of this machine.", False
    try:
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # connections that have just ended do not count
            one.bind(address)
            one.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} is in use; set another `port` in {file}.", True
        if error.errno == errno.EADDRNOTAVAIL:
            return f"{file}: host: {host} is not an address of this machine.", False
        if error.errno in (errno.EACCES, errno.EPERM):
            return f"port {port} needs special permissions; set `port` in {file} to 1024 or above.", False
        return f"{host}:{port} cannot be listened on: {error.strerror}; see `port` in {file}.", False
    return None
