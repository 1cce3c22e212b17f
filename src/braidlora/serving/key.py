"""The API key of a server: where it may come from, and when there must be one.

It is never on a command line, which other users of the machine can read, and never printed.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from braidlora.errors import ConfigError
from braidlora.paths import expanded

VARIABLE = "BRAIDLORA_API_KEY"


@dataclass(frozen=True)
class Key:
    """An API key.

    Attributes:
        value: not shown by `repr`.
        shell: how to write it in a shell without its value.
    """

    value: str
    shell: str

    def __repr__(self) -> str:
        return f"Key({self.shell})"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def find(host: str, file: str | None) -> Key | None:
    """The key of a server that listens on `host`: from the file, or else from the variable BRAIDLORA_API_KEY.

    Raises:
        ConfigError: there is none although others can reach the address, or the file is readable by others.
    """
    if file is not None:
        return _from_file(expanded(file))
    value = os.environ.get(VARIABLE)
    if value is not None:
        return Key(_checked(value, VARIABLE), f"${VARIABLE}")
    if not is_loopback(host):
        raise ConfigError(
            f"--host: {host} can be reached from other machines, so an API key is required. Set {VARIABLE}, or give a "
            "file with --api-key-file FILE (mode 0600), or listen on 127.0.0.1."
        )
    return None


def _from_file(path: Path) -> Key:
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            text = file.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--api-key-file: {path} cannot be read: {getattr(error, 'strerror', error)}."
        ) from None
    mode = stat.S_IMODE(status.st_mode)
    if os.name == "posix" and mode & 0o177:
        raise ConfigError(
            f"--api-key-file: {path} has mode {mode:04o}, so others may read it; expected 0600. chmod 600 {path}"
        )
    return Key(_checked(text.strip(), f"--api-key-file: {path}"), f"$(cat {_quoted(str(path.resolve()))})")


def _checked(value: str, where: str) -> str:
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(f"{where}: is not a key; expected one line of ASCII letters, digits and signs.")
    return value


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
