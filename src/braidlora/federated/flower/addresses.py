"""Host names and addresses as operators write them. Imports no torch."""

from __future__ import annotations

import ipaddress
import re

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_\-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*\.?")
_FORM = "expected HOST:PORT, such as federation.example.org:9092"


def host_problem(text: str) -> str | None:
    """Why this is not a host name or an IP address; None if it is one."""
    expected = "expected a host name or an IP address, such as federation.example.org"
    if "://" in text:
        return f"{expected}, without {text.partition('://')[0]}://"
    try:
        ipaddress.ip_address(text)
        return None
    except ValueError:
        pass
    # 10.0.0.300 and 10.0.0 are no names.
    if _NAME.fullmatch(text) and len(text) <= 253 and not re.fullmatch(r"[0-9.]+", text):
        return None
    if re.fullmatch(r".*[^:]:\d+", text):
        return f"{expected}, without a port"
    return expected


def address_problem(text: str) -> str | None:
    """Why this is not HOST:PORT, or [IPv6 address]:PORT; None if it is."""
    if "://" in text:
        return f"{_FORM}, without {text.partition('://')[0]}://"
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        return _FORM
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        return None if ":" in host and host_problem(host) is None else _FORM
    if ":" in host:
        return f"{_FORM}; write an IPv6 address in brackets, such as [2001:db8::1]:9092"
    return None if host_problem(host) is None and "*" not in host else _FORM
