"""How a client learns from its next payload whether its last round counted."""

from __future__ import annotations

from braidlora.errors import CheckpointError
from braidlora.federated.protocol.payload import Payload
from braidlora.federated.protocol.state import ClientState, StateStore


def counted_state(store: StateStore, payload: Payload) -> ClientState | None:
    """The state that the payload builds on; None if no round of this client has counted. The store is unchanged.

    Raises:
        CheckpointError: the payload does not fit the store, or the state is damaged.
    """
    check_fit(store, payload)
    return store.load(payload.counted_round, payload.experiment) if payload.counted_round else None


def settle(store: StateStore, payload: Payload) -> ClientState | None:
    """Commit or drop the pending state, as the payload says. Returns as `counted_state`.

    A state of the payload's own round stays until the new try replaces it: the update of the first try may count.

    Raises:
        CheckpointError: the payload does not fit the store, or the state is damaged; the store is unchanged.
    """
    state, pending = counted_state(store, payload), store.pending
    if pending and state is None:
        store.load(pending, payload.experiment)  # never drop the state of another federation
    if pending and pending == payload.counted_round:
        store.commit()
    elif pending and pending != payload.round:
        store.drop()
    return state


def check_fit(store: StateStore, payload: Payload) -> None:
    """Refuse a payload that continues from a state the client does not have, or that is older than the client.

    Raises:
        CheckpointError: with what the payload says, what the client has, and what to do.
    """
    round, counted = payload.round, payload.counted_round
    committed, pending = store.committed, store.pending
    has = f"it has {_round(committed)} committed" + (f" and {_round(pending)} pending" if pending else "")
    if round <= max(committed, counted) or round < pending:
        raise CheckpointError(
            f"client {store.client!r}: received the payload of round {round}, which is stale: {has}. Discard it; if "
            f"the server was rolled back, roll the client's store back to round {counted} as well."
        )
    if counted == committed or (pending and counted == pending):
        return
    remedy = (
        "The client's state was lost or is an older copy: restore it, or join as a new client."
        if counted > max(committed, pending)
        else f"The payload belongs to another federation, or the server was rolled back: if it was, roll the client's "
        f"store back to round {counted} as well."
    )
    raise CheckpointError(
        f"client {store.client!r}: the payload of round {round} builds on {_round(counted)} of this client, but {has}. "
        + remedy
    )


def _round(number: int) -> str:
    return f"round {number}" if number else "no round"
