"""The client's side of a round as a function: payload and own state in, update and new state out. No transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from braidlora.config import FederatedConfig
from braidlora.errors import CheckpointError
from braidlora.federated.protocol.clients import TrainingClient
from braidlora.federated.protocol.factors import AXES, AdaptedLayer, split
from braidlora.federated.protocol.initial import start_factors
from braidlora.federated.protocol.payload import Payload
from braidlora.federated.protocol.privacy import private_update
from braidlora.federated.protocol.recipe import make_mechanism
from braidlora.federated.protocol.rules.rule import Part, Rule
from braidlora.federated.protocol.seeds import derive_seed
from braidlora.federated.protocol.settle import settle
from braidlora.federated.protocol.state import ClientState, StateStore
from braidlora.federated.protocol.update import ClientUpdate

C = TypeVar("C", bound=TrainingClient)
C_contra = TypeVar("C_contra", bound=TrainingClient, contravariant=True)


@dataclass(frozen=True)
class Trained:
    """Result of a local training: mean loss, loss by task, optimizer steps, and the optimizer's state if kept."""

    loss: float
    losses: dict[str, float]
    steps: int
    optimizer: dict[str, Tensor]


class LocalModel(Protocol[C_contra]):
    """A base model in memory with an adapter, and the rows of the clients that train it.

    Attributes:
        config: the recipe.
        rule: the recipe's rule.
        layers: the adapted layers.
        head: the tensors that are trained in full, as all clients start with them.
    """

    config: FederatedConfig
    rule: Rule
    layers: list[AdaptedLayer]
    head: dict[str, Tensor]

    def load(self, rank: int, scaling: float, tensors: Mapping[str, Tensor], trains: Collection[str]) -> None:
        """Make these tensors the active adapter, of which the factors `trains` are trained.

        Raises:
            CheckpointError: names or shapes do not fit.
        """

    def read(self) -> dict[str, Tensor]:
        """Copies of the active adapter's tensors."""

    def train(self, client: C_contra, round: int, seed: int, optimizer: Mapping[str, Tensor]) -> Trained:
        """Train the active adapter on the client's rows."""

    def num_examples(self, client: C_contra) -> int:
        """How many training rows the client has."""


@dataclass(frozen=True)
class StepResult:
    """The update to send, the state to hold before it is sent, and measurements of the training."""

    update: ClientUpdate
    state: ClientState
    loss: float
    losses: dict[str, float]
    steps: int
    seconds: float


def client_step(
    model: LocalModel[C],
    client: C,
    payload: Payload,
    store: StateStore,
    *,
    observe: Callable[[Literal["before", "after"]], None] | None = None,
) -> StepResult:
    """One client's part of a round: settle the last one, load the payload, train.

    The result depends on the arguments alone: other clients that trained in `model` before leave no trace. The caller
    holds `state` in the store, then sends `update`.

    Args:
        model: the base model; the client's adapter stays active in it.
        payload: from the server.
        store: the client's own.
        observe: called before and after training, e.g. to score the active adapter.

    Raises:
        CheckpointError: the payload does not fit the store, or the state is damaged or another client's.
        TrainingError: a loss, gradient or weight is not finite, or memory ran out.
    """
    start = time.monotonic()
    config, rule, round = model.config.federation, model.rule, payload.round
    if store.client != client.name:
        raise CheckpointError(f"the store is that of client {store.client!r}; expected {client.name!r}'s.")
    state = settle(store, payload) or first_state(model, client, payload.experiment)
    tensors = received(model, client, payload, state, reset=config.state == "reset-each-round")
    model.load(client.rank, client.scaling, tensors, rule.spec.at(round).trains)
    if observe is not None:
        observe("before")
    optimizer = {
        name: moments
        for name, moments in state.optimizer.items()
        if split(name.partition("/")[2])[1] not in rule.spec.restarts
    }
    trained = model.train(client, round, derive_seed(client.seed, round), optimizer)
    if observe is not None:
        observe("after")
    own = model.read()
    hides = hides_from_server(model.config)
    update = ClientUpdate(
        client=client.name,
        num_examples=1 if hides else model.num_examples(client),
        tensors=sent(model, own, round, start=tensors, client=client.name),
        rank=client.rank,
        scaling=client.scaling,
        round=round,
        steps=0 if hides else trained.steps,
    )
    carried = {name: tensor for name, tensor in tensors.items() if split(name)[1] in rule.spec.carried}
    new = ClientState(client.name, payload.experiment, round, {**own, **carried}, trained.optimizer)
    return StepResult(update, new, trained.loss, trained.losses, trained.steps, time.monotonic() - start)


def first_state(model: LocalModel[C], client: C, experiment: str) -> ClientState:
    """A client's state before its first round."""
    factors = start_factors(model.config, model.rule, model.layers, client.rank, client.seed)
    return ClientState(client.name, experiment, 0, {**factors, **model.head})


def received(
    model: LocalModel[C], client: C, payload: Payload, state: ClientState, *, reset: bool = False
) -> dict[str, Tensor]:
    """A client's tensors with the payload applied: the model it starts a round with.

    Args:
        reset: whether factors that stay with the client go back to their start.
    """
    rule = model.rule
    tensors = dict(state.tensors)
    if state.round and rule.spec.restarts:
        generator = torch.Generator().manual_seed(derive_seed(client.seed, payload.round, "restart"))
        tensors = rule.restart(tensors, generator)
    if reset:
        start = first_state(model, client, state.experiment).tensors
        tensors |= {name: tensor for name, tensor in start.items() if split(name)[1] in AXES}
    part = None
    if payload.weight is not None and payload.counted_round == payload.shared_round == state.round:
        part = Part(payload.weight, sent(model, state.tensors, state.round))
    return tensors | rule.received(payload.tensors, client.rank, tensors, full=payload.full, part=part)


def sent(
    model: LocalModel[C],
    tensors: Mapping[str, Tensor],
    round: int,
    *,
    start: Mapping[str, Tensor] | None = None,
    client: str = "",
) -> dict[str, Tensor]:
    """What a client with these tensors sends in a round, in the dtype in which it travels.

    Args:
        start: its tensors before it trained, which privacy needs if clients add the noise.
        client: its name.
    """
    outgoing = model.rule.outgoing(tensors, round)
    if start is not None and hides_from_server(model.config):
        # N is the server's business, and clients do not divide by it.
        mechanism = make_mechanism(model.config, clients=1)
        assert mechanism is not None
        outgoing = private_update(outgoing, start, mechanism, client, round)
    dtype = getattr(torch, model.config.federation.upload_dtype)
    return {name: tensor.to(dtype) for name, tensor in sorted(outgoing.items())}


def hides_from_server(config: FederatedConfig) -> bool:
    """Whether clients protect their rows from the server as well, so that nothing but the noisy update may travel."""
    privacy = config.federation.privacy
    return privacy is not None and privacy.noise == "clients"
