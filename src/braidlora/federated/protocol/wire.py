"""Payloads, updates and tensors as bytes: JSON and safetensors, which carry data and no code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from braidlora.errors import CheckpointError, FederationError
from braidlora.federated.protocol.payload import Payload
from braidlora.federated.protocol.update import ClientUpdate
from braidlora.json_text import loads

_HEADER = "braidlora"  # one key, since safetensors writes several in arbitrary order


class Message(NamedTuple):
    """A payload or an update as it travels.

    Args:
        header: JSON, all fields but the tensors.
        tensors: packed.
    """

    header: bytes
    tensors: bytes


def pack_message(value: Payload | ClientUpdate) -> Message:
    """A payload or an update as bytes."""
    fields = {name: getattr(value, name) for name in _names(type(value))}
    return Message(json.dumps(fields).encode(), pack(value.tensors))


def unpack_payload(message: Message) -> Payload:
    """The payload of a message.

    Raises:
        FederationError: it is not a payload.
    """
    payload = Payload(**_fields(message, Payload))
    numbers = payload.round, payload.shared_round, payload.counted_round
    weight = payload.weight
    if (
        not all(type(number) is int and number >= 0 for number in numbers)
        or type(payload.full) is not bool
        or (weight is not None and not (type(weight) in (int, float) and 0 < weight <= 1))
    ):
        raise FederationError(
            f"received a message that is not a payload: its header is {_shown(message.header)}."
        )
    return payload


def unpack_update(message: Message) -> ClientUpdate:
    """The update of a message, whose values the guard has yet to judge.

    Raises:
        FederationError: it is not an update.
    """
    return ClientUpdate(**_fields(message, ClientUpdate))


def _fields(message: Message, kind: type[Payload | ClientUpdate]) -> dict[str, Any]:
    try:
        fields = loads(message.header)
    except ValueError:
        fields = None
    expected = _names(kind)
    if not isinstance(fields, dict) or fields.keys() != set(expected):
        raise FederationError(
            f"received a message whose header is {_shown(message.header)}; expected {', '.join(sorted(expected))}."
        )
    return {**fields, "tensors": unpack(message.tensors)}


def _names(kind: type[Payload | ClientUpdate]) -> list[str]:
    return [one.name for one in dataclasses.fields(kind) if one.name != "tensors"]


def _shown(header: bytes) -> str:
    return repr(header[:200])


def pack(tensors: Mapping[str, Tensor], header: str = "") -> bytes:
    """Tensors as safetensors, ordered by name; no bytes for no tensors."""
    if not tensors and not header:
        return b""
    ordered = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    data: bytes = save(ordered, {_HEADER: header} if header else None)
    return data


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors that `pack` was given.

    Raises:
        FederationError: the bytes are not safetensors.
    """
    if not data:
        return {}
    try:
        return _ordered(load(data))
    except (SafetensorError, ValueError, KeyError) as error:
        raise FederationError(f"received {len(data)} bytes that are not safetensors: {error}.") from None


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name: safetensors has another order in every process, and messages list tensors as they come."""
    return dict(sorted(tensors.items()))


def parse(data: bytes, name: str) -> tuple[dict[str, Tensor], str]:
    """Tensors and header that `pack` was given.

    Args:
        name: of the data, for errors.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        tensors = _ordered(load(data))
        length = int.from_bytes(data[:8], "little")  # of the JSON that a safetensors file begins with
        return tensors, loads(data[8 : 8 + length]).get("__metadata__", {}).get(_HEADER, "")
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name}: not readable as safetensors: {error}.") from None
