"""A message as Flower carries it: its kind, a JSON header, and packed tensors. None of it can carry code."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from braidlora.errors import FederationError
from braidlora.json_text import loads

if TYPE_CHECKING:
    from flwr.app import RecordDict

PROTOCOL = 1  # of the messages of this package; both sides must speak the same
_RECORD, _TENSORS, _STYPE = "braidlora", "tensors", "braidlora.safetensors"
_LONGEST_HEADER = 64 << 20  # bytes; a handshake lists all layers, an answer all scores


@dataclass(frozen=True)
class Envelope:
    """One message.

    Args:
        kind: what is asked, or what it answers: `hello`, `begin`, `job`.
        header: JSON values.
        tensors: safetensors, or nothing.
    """

    kind: str
    header: dict[str, Any]
    tensors: bytes = b""

    def to_record(self) -> RecordDict:
        """As Flower's records. The tensors are an array, because Flower sends arrays in chunks."""
        from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

        header = json.dumps(self.header, allow_nan=False)
        # Flower stores equal contents once, and logs errors when two sites send the same at the same time.
        unique = secrets.token_hex(8)
        record = RecordDict(
            {
                _RECORD: ConfigRecord(
                    {"protocol": PROTOCOL, "kind": self.kind, "header": header, "unique": unique}
                )
            }
        )
        if self.tensors:
            array = Array("uint8", (len(self.tensors),), _STYPE, self.tensors)
            record[_TENSORS] = ArrayRecord({_TENSORS: array})
        return record

    @classmethod
    def from_record(cls, record: RecordDict) -> Envelope:
        """From Flower's records, which may hold anything.

        Raises:
            FederationError: it is not a message of this package, or of another version of the protocol.
        """
        found = record.config_records.get(_RECORD)
        if found is None:
            raise FederationError("received a message that is not braidlora's.")
        protocol, kind, text = (found.get(key) for key in ("protocol", "kind", "header"))
        if protocol != PROTOCOL:
            raise FederationError(
                f"protocol: received a message of version {protocol!r}; expected {PROTOCOL}. Install the same version "
                "of braidlora at the server and at all sites."
            )
        if not isinstance(kind, str) or not isinstance(text, str) or len(text) > _LONGEST_HEADER:
            raise FederationError("received a message without a header.")
        try:
            header = loads(text)
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise FederationError("received a message whose header is not a JSON object.")
        arrays = record.array_records.get(_TENSORS)
        array = arrays.get(_TENSORS) if arrays is not None else None
        return cls(kind, header, array.data if array is not None else b"")
