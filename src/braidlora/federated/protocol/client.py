"""The client's side of a round, as a function: payload and own state in, update and new state out. No transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from braidlora.errors import CheckpointError
from braidlora.federated.protocol.factors import AXES, split
from braidlora.federated.protocol.initial import start_factors
from braidlora.federated.protocol.update import ClientUpdate
from braidlora.federated.site.clients import Client, derive_seed
from braidlora.federated.site.host import Host
from braidlora.federated.site.local_training import train_locally
from braidlora.federated.site.scores import Scores
from braidlora.federated.site.state import ClientState


@dataclass(frozen=True)
class Payload:
    """What the server sends to a client.

    Args:
        round: the round it is for.
        since: the round that the shared state comes from; 0 before any has counted.
        tensors: what the rule sends down.
        whole: flora: whether this is all rounds' stack rather than the last round's.
    """

    round: int
    since: int
    tensors: Mapping[str, Tensor]
    whole: bool = False


@dataclass(frozen=True)
class StepResult:
    """What `client_step` gives: the update to send, the state to keep if it counts, and what was measured."""

    update: ClientUpdate
    state: ClientState
    loss: float
    losses: dict[str, float]
    steps: int
    seconds: float
    before: Scores | None = None
    after: Scores | None = None


def client_step(
    host: Host,
    client: Client,
    payload: Payload,
    state: ClientState,
    *,
    score: Callable[[], Scores] | None = None,
    score_before: bool = True,
) -> StepResult:
    """One client's part of a round: take the payload in, train, and say what to send.

    All that it depends on is in the arguments: whoever trained in `host` before leaves no trace.

    Args:
        host: the base model; it is left wearing the client's adapter.
        client: who it is.
        payload: from the server.
        state: the client's own, from `first_state` or its last step.
        score: scores the model that `host` wears; called before and after training where given.
        score_before: False leaves out the first of the two.

    Raises:
        CheckpointError: the state is another client's, or of a later round.
        TrainingError: training met something that is not finite, or ran out of memory.
    """
    start = time.monotonic()
    config, rule, round = host.config.federation, host.rule, payload.round
    _check_state(client, state, round)
    tensors = received(host, client, payload, state, reset=config.state == "reset-each-round")
    host.wear(client.rank, client.scaling, tensors, rule.spec.at(round).trains)
    before = score() if score is not None and score_before else None
    optimizer = {
        name: moments
        for name, moments in state.optimizer.items()
        if split(name.partition("/")[2])[1] not in rule.spec.restarts
    }
    trained = train_locally(host, client, round, derive_seed(client.seed, round), optimizer)
    after = score() if score is not None else None
    own = host.read()
    dtype = getattr(torch, config.upload_dtype)
    update = ClientUpdate(
        client=client.name,
        num_examples=len(host.rows(client)),
        tensors={name: tensor.to(dtype) for name, tensor in sorted(rule.outgoing(own, round).items())},
        rank=client.rank,
        scaling=client.scaling,
        round=round,
        steps=trained.steps,
    )
    carried = {name: tensor for name, tensor in tensors.items() if split(name)[1] in rule.spec.carried}
    new = ClientState(client.name, state.experiment, round, {**own, **carried}, trained.optimizer)
    seconds = time.monotonic() - start
    return StepResult(update, new, trained.loss, trained.losses, trained.steps, seconds, before, after)


def first_state(host: Host, client: Client, experiment: str) -> ClientState:
    """A client's state before its first round."""
    factors = start_factors(host.config, host.rule, host.layers, client.rank, client.seed)
    return ClientState(client.name, experiment, 0, {**factors, **host.head})


def received(
    host: Host, client: Client, payload: Payload, state: ClientState, *, reset: bool = False
) -> dict[str, Tensor]:
    """A client's tensors as the payload makes them: the model that it starts a round with.

    Args:
        reset: whether factors that stay with the client go back to their start.
    """
    rule = host.rule
    tensors = dict(state.tensors)
    if state.round and rule.spec.restarts:
        generator = torch.Generator().manual_seed(derive_seed(client.seed, payload.round, "restart"))
        tensors = rule.restart(tensors, generator)
    if reset:
        start = first_state(host, client, state.experiment).tensors
        tensors |= {name: tensor for name, tensor in start.items() if split(name)[1] in AXES}
    return tensors | rule.received(payload.tensors, client.rank, tensors, full=payload.whole)


def _check_state(client: Client, state: ClientState, round: int) -> None:
    if state.client != client.name:
        raise CheckpointError(f"the state is that of client {state.client!r}; expected {client.name!r}'s.")
    if state.round >= round:
        raise CheckpointError(
            f"client {client.name!r}: its state is of round {state.round}, and round {round} is to be trained. It "
            "belongs to a later point of the federation; use the state of the round before."
        )
