"""Payloads and updates as bytes: what was packed comes out, and nothing else is taken."""

import dataclasses
import json

import pytest
import torch

from braidlora.errors import FederationError
from braidlora.federated import ClientUpdate
from braidlora.federated.protocol.payload import Payload
from braidlora.federated.protocol.wire import (
    Message,
    pack,
    pack_message,
    parse,
    unpack_payload,
    unpack_update,
)

TENSORS = {"b.lora_B.weight": torch.randn(3, 2), "a.lora_A.weight": torch.randn(2, 5).bfloat16()}
PAYLOAD = Payload(4, 3, 2, TENSORS, full=True, experiment="0123")
UPDATE = ClientUpdate("up", 17, TENSORS, rank=3, scaling=8 / 3, round=4, steps=2)


def same(one, other):
    assert {**vars(one), "tensors": None} == {**vars(other), "tensors": None}
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name])


def test_what_was_packed_comes_out():
    same(unpack_payload(pack_message(PAYLOAD)), PAYLOAD)
    same(unpack_update(pack_message(UPDATE)), UPDATE)
    assert pack_message(Payload(1, 0, 0, {})).tensors == b"", "no bytes for no tensors"


def test_tensors_come_out_in_the_order_of_their_names():
    """Whatever lists them, such as a rejection in rounds.jsonl, then reads the same after a resume."""
    tensors = {f"{number:02}.lora_B.weight": torch.ones(1, 1) for number in range(50)}
    update = dataclasses.replace(UPDATE, tensors=dict(reversed(tensors.items())))
    assert list(unpack_update(pack_message(update)).tensors) == list(tensors)
    assert list(parse(pack(update.tensors), "x")[0]) == list(tensors)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"\xff", b"[1]", b"{}", b"[" * 100_000,
        json.dumps({"round": 4, "shared_round": 3, "full": False, "experiment": "x"}).encode(),
        pack_message(PAYLOAD).header[:-1] + b', "more": 1}',
        pack_message(PAYLOAD).header.replace(b'"round": 4', b'"round": -4'),
        pack_message(PAYLOAD).header.replace(b'"round": 4', b'"round": true'),
        pack_message(PAYLOAD).header.replace(b'"full": true', b'"full": 1'),
    ],
)  # fmt: skip
def test_other_headers_are_refused(header):
    with pytest.raises(FederationError, match="received a message"):
        unpack_payload(Message(header, b""))
    with pytest.raises(FederationError, match="received a message whose header is"):
        unpack_update(Message(header, b""))


def test_bytes_that_are_not_safetensors_are_refused():
    for unpack, packed in ((unpack_payload, pack_message(PAYLOAD)), (unpack_update, pack_message(UPDATE))):
        with pytest.raises(FederationError, match="received 5 bytes that are not safetensors"):
            unpack(packed._replace(tensors=b"hello"))
