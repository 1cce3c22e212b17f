"""What the server sends to a client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.rules.rule import Rule
from braidlora.federated.protocol.state import ServerState


@dataclass(frozen=True)
class Payload:
    """What the server sends to a client.

    Args:
        round: the round it is for.
        shared_round: the round that the shared state comes from; 0 before any has counted.
        counted_round: the last round in which this client's update counted; 0 before any.
        tensors: what the rule sends down.
        full: whether the tensors are all that the rule shares, rather than what a client lacks that took part in
            `shared_round`; the same under most rules.
        experiment: id of the federation.
        weight: the share of this client's update in the shared state's last round; None if it has none, or if the
            aggregator does not weight.
    """

    round: int
    shared_round: int
    counted_round: int
    tensors: Mapping[str, Tensor]
    full: bool = False
    experiment: str = ""
    weight: float | None = None


def needs_catch_up(state: ServerState, client: str) -> bool:
    """Whether a client missed the last round that counted, so that it lacks what the next payload builds on.

    Payloads build on one another under flora, and under rules that alternate; a client that joins has missed all.
    """
    return state.shared_round > 0 and state.counted.get(client, 0) != state.shared_round


def make_payload(
    rule: Rule,
    state: ServerState,
    client: ClientSpec,
    round: int,
    tensors: Mapping[str, Tensor] | None = None,
) -> Payload:
    """What a client is sent for a round.

    Args:
        tensors: those of the payload if they are known already.
    """
    full = needs_catch_up(state, client.name)
    if tensors is None and full:
        tensors = rule.catch_up(state.shared, client.rank, client.scaling)
    elif tensors is None:
        tensors = rule.payload_for(state.shared, client.rank, client.scaling, state.shared_round)
    return Payload(
        round=round,
        shared_round=state.shared_round,
        counted_round=state.counted.get(client.name, 0),
        tensors=tensors,
        full=full,
        experiment=state.experiment,
        weight=None if full else state.weights.get(client.name),
    )
