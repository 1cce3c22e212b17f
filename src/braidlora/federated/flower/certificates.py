"""A certificate authority for development, the SuperLink's certificate, and the keys of nodes."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from braidlora.errors import ConfigError

_VALID = datetime.timedelta(days=365)
_SKEW = datetime.timedelta(hours=1)  # clocks of other machines may be behind


def make_certificates(folder: Path, hosts: Iterable[str]) -> None:
    """Write `ca.crt`, `ca.key`, `server.crt` and `server.key` to a folder.

    For development: an authority whose key lies next to the server's. Operators bring certificates of their own.

    Args:
        folder: created if it is missing.
        hosts: names and addresses by which sites reach the SuperLink; those of the loopback are added.

    Raises:
        ConfigError: a file is there already.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = datetime.datetime.now(datetime.timezone.utc)

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def begin(subject: str, issuer: str, key: Any) -> Any:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + _VALID)
        )

    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    title = "braidlora development CA"
    usage = {
        name: name in ("key_cert_sign", "crl_sign")
        for name in (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        )
    }  # fmt: skip
    ca = (
        begin(title, title, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    known = dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])
    certificate = (
        begin("braidlora SuperLink", title, server)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([_alternative(x509, host) for host in known]), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
        .sign(authority, hashes.SHA384())
    )
    write_private(folder / "ca.key", _pem(authority))
    write_private(folder / "server.key", _pem(server))
    write_public(folder / "ca.crt", _pem(ca))
    write_public(folder / "server.crt", _pem(certificate))


def make_node_key(folder: Path) -> str:
    """Write a node's key pair, `node.key` and `node.pub`, to a folder. Returns the public key.

    Raises:
        ConfigError: a file is there already.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_private(folder / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    write_public(folder / "node.pub", public + b"\n")
    return public.decode()


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on; raises ConfigError if it exists."""
    _write(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write a file that everybody can read; raises ConfigError if it exists."""
    _write(path, data, 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already; remove it first if you want a new one.") from None


def _pem(value: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if hasattr(value, "private_bytes"):
        data: bytes = value.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    else:
        data = value.public_bytes(Encoding.PEM)
    return data


def _alternative(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
