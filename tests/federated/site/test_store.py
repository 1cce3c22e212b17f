"""A client's store: what settles, what is refused, and what a crash or damage leaves."""

import dataclasses

import pytest
import torch
from client_states import payload_of

from braidlora.errors import CheckpointError
from braidlora.federated.protocol.settle import counted_state, settle
from braidlora.federated.protocol.state import ClientState
from braidlora.federated.protocol.wire import pack
from braidlora.federated.site.store import ClientStore
from braidlora.runs import IncompleteError, verify


def state(round, client="up", experiment="x"):
    return ClientState(client, experiment, round, {"a.lora_A.weight": torch.full((2, 2), float(round))})


def store_at(folder, committed=(), pending=None, keep_rounds=2):
    store = ClientStore(folder, "up", keep_rounds)
    for round in committed:
        store.hold(state(round))
        store.commit()
    if pending is not None:
        store.hold(state(pending))
    return store


@pytest.mark.parametrize(
    ("committed", "pending", "counted", "after"),
    [
        ((), None, 0, (0, 0)),
        ((), 1, 0, (0, 0)),  # the first round did not count
        ((), 1, 1, (1, 0)),
        ((1,), 3, 3, (3, 0)),
        ((1,), 3, 1, (1, 0)),
        ((1,), None, 1, (1, 0)),
    ],
)
def test_the_payload_settles_the_pending_state(tmp_path, committed, pending, counted, after):
    store = store_at(tmp_path, committed, pending)
    before = store.committed, store.pending
    payload = payload_of(4, counted=counted)
    seen = counted_state(store, payload)
    assert (store.committed, store.pending) == before, "a look changes nothing"
    found = settle(store, payload)
    assert (store.committed, store.pending) == after
    assert (seen is None, found is None) == (counted == 0, counted == 0)
    if found is not None:
        assert found.round == seen.round == counted
        assert pack(found.tensors) == pack(state(counted).tensors)
    again = settle(ClientStore(tmp_path, "up"), payload)
    assert (again is None) == (found is None), "a second try of the same round"


@pytest.mark.parametrize(
    ("committed", "pending", "round", "counted", "said"),
    [
        (
            (),
            None,
            2,
            1,
            "builds on round 1 of this client, but it has no round committed. The client's state was",
        ),
        ((1,), None, 4, 3, "builds on round 3 .* it has round 1 committed. The client's state was lost"),
        (
            (1, 3),
            None,
            5,
            1,
            "builds on round 1 .* has round 3 committed. The payload belongs to another federation, or the",
        ),
        ((3,), None, 5, 0, "builds on no round of this client, but it has round 3 committed"),
        ((1,), 3, 4, 2, "builds on round 2 of this client, but it has round 1 committed and round 3 pending"),
        ((2,), None, 2, 1, "payload of round 2, which is stale: it has round 2 committed. Discard it"),
        ((1,), 3, 2, 1, "payload of round 2, which is stale: it has round 1 committed and round 3 pending"),
        ((1,), 3, 3, 3, "payload of round 3, which is stale"),
    ],
)
def test_a_payload_that_fits_neither_state_is_refused(tmp_path, committed, pending, round, counted, said):
    """The client lost its state, or the payload is stale, foreign or of a later point; the store does not change."""
    store = store_at(tmp_path, committed, pending)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=f"client 'up'.*{said}"):
        settle(store, payload_of(round, counted=counted))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_try_of_a_round_keeps_the_first_state_until_it_is_replaced(tmp_path):
    """The first try's update may have arrived: a client that dies in the second try still has its state."""
    store = store_at(tmp_path, (1,), 3)
    assert settle(store, payload_of(3, counted=1)).round == 1
    assert (store.committed, store.pending) == (1, 3)
    assert settle(store, payload_of(4, counted=3)).round == 3


@pytest.mark.parametrize("round", [1, 2])
def test_a_state_of_another_federation_is_not_dropped(tmp_path, round):
    """No round of this client has counted there yet, so the payload itself fits."""
    store = store_at(tmp_path, (), 1)
    with pytest.raises(CheckpointError, match="experiment 'x'; expected experiment 'y'"):
        settle(store, dataclasses.replace(payload_of(round), experiment="y"))
    assert (store.committed, store.pending) == (0, 1)


def test_what_a_killed_process_left_is_removed(tmp_path):
    store = store_at(tmp_path, (1,))
    (tmp_path / "state" / ".pending-2.1-0123abcd.partial").mkdir()
    store.hold(state(2))
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["pending-2", "round-1"]


def test_a_state_is_verified_when_it_is_read(tmp_path):
    store = store_at(tmp_path, (1,))
    path = tmp_path / "state" / "round-1" / "state.safetensors"
    with pytest.raises(CheckpointError, match="experiment 'x'; expected experiment 'y'"):
        store.load(1, "y")
    with pytest.raises(CheckpointError, match="client 'up'; expected client 'rev'"):
        ClientStore(tmp_path, "rev").load(1, "x")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed since it was written"):
        store.load(1, "x")
    path.write_bytes(content[:-1])
    with pytest.raises(IncompleteError, match="truncated"):
        store.load(1, "x")
    assert [one["file"] for one in verify(tmp_path / "state")["damaged"]] == ["round-1/state.safetensors"]
    path.write_bytes(content)
    path.with_name("manifest.json").unlink()
    assert verify(tmp_path / "state")["damaged"], "a state without a manifest was never whole"
    with pytest.raises(IncompleteError, match="has no state for round 7"):
        store.load(7, "x")


def test_a_state_under_another_rounds_name_is_refused(tmp_path):
    store = store_at(tmp_path, (1,))
    (tmp_path / "state" / "round-1").rename(tmp_path / "state" / "round-3")
    with pytest.raises(CheckpointError, match="the state of round 1; expected round 3"):
        settle(store, payload_of(4, counted=3))


def test_states_stay_for_as_long_as_a_round_of_the_server_builds_on_them(tmp_path):
    """The server keeps rounds 5 to 7 after round 7: this client counted in 2, 4 and 6, so round 5 builds on 4."""
    store = store_at(tmp_path, (2, 4, 6), 7, keep_rounds=3)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["pending-7", "round-4", "round-6"]
    store.roll_back(5)
    assert (store.committed, store.pending) == (4, 0)
    store.roll_back(0)
    assert not list((tmp_path / "state").iterdir())


@pytest.mark.parametrize("step", ["replace", "rename"])
def test_a_crash_leaves_the_store_before_or_after(tmp_path, monkeypatch, step):
    import os
    from pathlib import Path

    store = store_at(tmp_path, (1,), 2)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash) if step == "replace" else patch.setattr(Path, "rename", crash)
        with pytest.raises(KeyboardInterrupt):
            settle(store, payload_of(3, counted=1 if step == "replace" else 2))
    assert (store.committed, store.pending) == (1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            store.hold(state(3))
    assert settle(store, payload_of(3, counted=2)).round == 2
