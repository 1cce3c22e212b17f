"""Which site a node of Flower's is: by its public key, or where there are no keys by what it says itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from braidlora.errors import FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.status import Status

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.serverapp import Grid

WHO = "who"
_ASKED_FOR = 60.0  # seconds that a node has to say who it is


class Names(Protocol):
    """Says which site a node is."""

    def of(self, nodes: Iterable[NodeInfo]) -> dict[str, NodeInfo]:
        """These nodes by the names of their sites; nodes that are no site's are left out."""


class KeyNames:
    """By the public key that a node has proven to have.

    Args:
        keys: public keys in OpenSSH's format, by site.
        status: told of nodes that are no site's.
    """

    def __init__(self, keys: Mapping[str, str], status: Status) -> None:
        self._sites = {plain_key(key): site for site, key in keys.items()}
        self._status, self._known = status, dict[bytes, str | None]()

    def of(self, nodes: Iterable[NodeInfo]) -> dict[str, NodeInfo]:
        found = {}
        for node in nodes:
            if node.public_key not in self._known:
                site = self._sites.get(key_of_node(node.public_key))
                self._known[node.public_key] = site
                if site is None:
                    self._status.note(
                        f"node {node.node_id} is connected, but its key is not registered for any site; it "
                        "receives no messages"
                    )
            name = self._known[node.public_key]
            if name is not None:
                found[name] = node
        return found


class AskedNames:
    """By what a node answers: in a simulation, and on the loopback without keys.

    Args:
        grid: Flower's.
        sites: all sites.
        status: told of nodes that are no site's.
    """

    def __init__(self, grid: Grid, sites: Iterable[str], status: Status, poll: float) -> None:
        self._grid, self._sites, self._status, self._poll = grid, set(sites), status, poll
        self._known: dict[int, str | None] = {}

    def of(self, nodes: Iterable[NodeInfo]) -> dict[str, NodeInfo]:
        nodes = list(nodes)
        self._ask([node.node_id for node in nodes if node.node_id not in self._known])
        found: dict[str, NodeInfo] = {}
        for node in nodes:
            name = self._known.get(node.node_id)
            if name is None:
                continue
            if name in found:
                self._status.note(f"two nodes claim to be {name}; the first one is used")
                continue
            found[name] = node
        return found

    def _ask(self, ids: list[int]) -> None:
        from flwr.app import Message

        question = Envelope(WHO, {}).to_record()
        waiting: dict[str, int] = {}
        for node in ids:
            [number] = self._grid.push_messages([Message(question, node, "query", ttl=_ASKED_FOR)])
            if number is not None:
                waiting[str(number)] = node
        end = time.monotonic() + _ASKED_FOR
        while waiting and time.monotonic() < end:
            for message in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(message.metadata.reply_to_message_id)
                self._known[node] = self._answer(node, message)
            if waiting:
                time.sleep(self._poll)

    def _answer(self, node: int, message: object) -> str | None:
        try:
            name = Envelope.from_record(message.content).header.get("client")  # type: ignore[attr-defined]
        except (FederationError, ValueError):  # Flower raises the latter for a message with an error
            name = None
        if name not in self._sites:
            self._status.note(f"node {node} claims to be {str(name)[:80]!r}, which is not the name of a site")
            return None
        return str(name)


def plain_key(line: str) -> bytes:
    """A public key in OpenSSH's format without its comment.

    Raises:
        ValueError: it is not one, or not one that Flower takes (elliptic curve).
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("expected a line that starts with ecdsa-sha2-nistp384") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"expected an elliptic-curve key (ecdsa-sha2-nistp384), got {line.split(' ')[0]}")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def key_of_node(data: bytes) -> bytes:
    """The public key of a node in the same form; empty if it is not one."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        return load_pem_public_key(data).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    except ValueError:
        return b""
