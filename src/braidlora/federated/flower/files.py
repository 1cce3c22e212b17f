"""Certificates and keys that an operator names: each check says what a file is instead of what it should be."""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

from braidlora.errors import ConfigError

_MOST_BYTES = 2**18  # certificates and keys are far smaller
_PRIVATE, _CERTIFICATE = b"PRIVATE KEY", b"BEGIN CERTIFICATE"


def read_small(path: Path, hint: str = "") -> bytes:
    """The content of a file that is a certificate or a key.

    Args:
        hint: what to do if there is no such file.

    Raises:
        ConfigError: it does not exist, is a folder, is empty, is too large, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{f'; {hint}' if hint else ''}.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder; expected a file.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    if not data.strip():
        raise ConfigError(f"{path}: an empty file.")
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{path}: too large to be a certificate or a key.")
    return data


def check_certificate(path: Path, hint: str = "") -> None:
    """Reject what is not a certificate in PEM format, or has a private key in it.

    Raises:
        ConfigError: says what it is instead.
    """
    data = read_small(path, hint)
    if _PRIVATE in data:
        raise ConfigError(
            f"{path}: this is a private key; give the certificate, and keep the key at the server."
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            f"{path}: not a certificate in PEM format, which starts with -----BEGIN CERTIFICATE-----."
        ) from None


def check_pair(certificate: Path, key: Path) -> None:
    """Reject a certificate and a private key that do not belong together, or that cannot be used.

    Raises:
        ConfigError: names both files.
    """
    if _CERTIFICATE not in read_small(certificate):
        check_certificate(certificate)
    check_private(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"{key}: not the private key of {certificate}; the two are made together."
            ) from None
        raise ConfigError(
            f"{certificate} and {key}: not a certificate and its private key in PEM format without a password."
        ) from None


def check_private(path: Path) -> None:
    """Reject a private key that is missing or is not one, or that others than its owner can read.

    Raises:
        ConfigError: with the command that repairs it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path}: the private key cannot be read: {error.strerror}.") from None
    if _PRIVATE not in read_small(path):
        raise ConfigError(
            f"{path}: not a private key in PEM format, which starts with -----BEGIN … PRIVATE KEY-----."
        )
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            f"{path}: mode {mode:04o} lets others read this private key; run: chmod 600 {path}. If others may have "
            "read it, make a new one."
        )


def read_public_key(path: Path) -> str:
    """A node's public key in OpenSSH's format, without its comment.

    Raises:
        ConfigError: says what the file is instead.
    """
    from braidlora.federated.flower.names import plain_key

    data = read_small(path)
    if _PRIVATE in data:
        raise ConfigError(
            f"{path}: not a node's public key; send node.pub. This is a private key, which must not leave its site: "
            "make a new one there (`braidlora site init` in a new folder), and delete this one."
        )
    if _CERTIFICATE in data:
        raise ConfigError(f"{path}: not a node's public key; send node.pub. This is a certificate.")
    try:
        line = " ".join(data.decode("utf-8").split()[:2])
        plain_key(line)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a node's public key; send node.pub. It is not a text file.") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not a node's public key; send node.pub ({error}).") from None
    return line
