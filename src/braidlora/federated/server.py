"""The server's side of a round: whom to ask, what to send, what counts, and the new shared state. No transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braidlora.config import FederatedConfig
from braidlora.errors import FederationError
from braidlora.federated._update import ClientUpdate
from braidlora.federated.client import Payload
from braidlora.federated.clients import Client, derive_seed
from braidlora.federated.factors import AdaptedLayer
from braidlora.federated.guard import Guard, capped_weights, has_quorum
from braidlora.federated.host import make_rule
from braidlora.federated.initial import start_factors
from braidlora.federated.mean import Aggregator
from braidlora.federated.robust import get_aggregator


class Server:
    """Holds the shared state and moves it by one round at a time: `open`, `take` for every update, `close`.

    Args:
        config: the recipe.
        clients: all clients, by name.
        layers: the adapted layers of the model.
        head: the tensors that are trained in full, as all clients start with them.

    Attributes:
        shared: the shared state; empty before a round has counted.
        since: the round that it comes from; 0 before any.
        counted: by client, the last round in which its update counted.

    Raises:
        ConfigError: ranks or scalings do not fit the rule.
    """

    def __init__(
        self,
        config: FederatedConfig,
        clients: Mapping[str, Client],
        layers: Sequence[AdaptedLayer],
        head: Mapping[str, Tensor],
    ) -> None:
        self._config, self._clients = config.federation, clients
        self._seed = config.seed
        self._asked_per_round = config.asked_per_round(len(clients))
        largest_rank = max(client.rank for client in clients.values())
        self._rule = make_rule(config, head, _aggregator(config, self._asked_per_round), largest_rank)
        self.guard = Guard(
            self._rule,
            layers,
            {name: client.rank for name, client in clients.items()},
            scalings={name: client.scaling for name, client in clients.items()},
            r_intermediate=self._config.r_intermediate,
            dtype=getattr(torch, self._config.upload_dtype),
            shared_shapes={name: tuple(tensor.shape) for name, tensor in head.items()},
        )
        # What the first round's changes are measured from, where an aggregator does so. It is not sent to anybody.
        self._start = {**start_factors(config, self._rule, layers, largest_rank), **head}
        self.shared: dict[str, Tensor] = {}
        self.since = 0
        self.counted: dict[str, int] = {}
        self._made: dict[tuple[int, bool], Mapping[str, Tensor]] = {}  # payloads that are the same for all
        self._round = 0
        self._rows: dict[str, int] = {}
        self._held: list[ClientUpdate] = []

    def sample(self, round: int) -> list[str]:
        """The clients to ask in a round, in sorted order; a function of the recipe's seed and the round alone."""
        return sampled(self._clients, self._asked_per_round, self._seed, round)

    def payload(self, name: str, round: int) -> Payload:
        """What a client is sent for a round. The tensors may be those that others are sent: they are for reading."""
        client = self._clients[name]
        # Who missed the last round that counted has not got its payload, which builds on the one before in flora.
        whole = self.since > 0 and self.counted.get(name, 0) != self.since
        make = self._rule.catch_up if whole else self._rule.payload_for
        if self._rule.payload_by_rank:
            return Payload(round, self.since, make(self.shared, client.rank, client.scaling), whole)
        if (self.since, whole) not in self._made:  # in flora a decomposition of every layer
            self._made[self.since, whole] = make(self.shared, client.rank, client.scaling)
        return Payload(round, self.since, self._made[self.since, whole], whole)

    def open(self, round: int, asked: Iterable[str]) -> None:
        """Begin a round with these clients."""
        self.guard.open(round, asked)
        self._rule.start(self.shared or self._start)
        self._round, self._rows, self._held = round, {}, []

    def take(self, update: ClientUpdate) -> None:
        """Judge one update, and take it into the aggregate. Updates must come in the order of the clients' names.

        Raises:
            FederationError: with everything that is wrong with it (UpdateRejected where the guard says so). Nothing
                has changed then: the round goes on without it, and its client may send another.
        """
        self.guard.judge(update)
        if self._config.share_cap is None:
            self._rule.add(update)
        else:
            self._rule.check(update)
            self._held.append(update)  # its weight depends on who else takes part
        # Last, so that what refuses an update leaves no trace of it: the client may send another.
        self.guard.accept(update.client)
        self._rows[update.client] = update.num_examples

    def close(self) -> str:
        """End the round with a new shared state, or leave the old one and say why the round does not count."""
        count, asked = len(self._rows), len(self._rows) + len(self.guard.missing)
        if not has_quorum(count, asked, min_clients=self.needed(), fraction=self._config.quorum):
            least = max(self.needed(), math.ceil(self._config.quorum * asked - 1e-9))
            return f"{count} of {asked} clients took part; the round needs {least}"
        try:
            if self._held and self._config.share_cap is not None:
                weights = capped_weights(self._rows, self._config.share_cap)
                for update in self._held:
                    self._rule.add(update, weights[update.client])
            self.shared = self._rule.finish()
        except FederationError as error:
            return str(error)
        self.since, self._made = self._round, {}
        self.counted |= dict.fromkeys(self._rows, self._round)
        return ""

    def needed(self) -> int:
        """How many updates a round needs: `min_clients`, what the aggregator needs, what the cap on a share allows."""
        needed, robust = self._config.min_clients, self._config.robust
        if robust.f is not None:
            needed = max(needed, 2 * robust.f + 3)
        if robust.trim:
            needed = max(needed, math.ceil(1.0 / robust.trim - 1e-9))
        if self._config.share_cap is not None:
            needed = max(needed, math.ceil(1.0 / self._config.share_cap - 1e-9))
        return needed


def sampled(clients: Iterable[str], number: int, seed: int, round: int) -> list[str]:
    """The clients that a federation of this seed asks in a round, `number` of them, in sorted order."""
    names = sorted(clients)
    if number == len(names):
        return names
    random = np.random.default_rng(derive_seed(seed, "sample", round))
    chosen = random.choice(len(names), size=number, replace=False)
    return [names[index] for index in sorted(chosen)]


def _aggregator(config: FederatedConfig, asked: int) -> Aggregator | None:
    robust = config.federation.robust
    if robust.aggregator == "mean":
        return None
    given = {key: getattr(robust, key) for key in ("max_norm", "trim", "f", "keep")}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if robust.f is not None or robust.trim is not None:
        settings["clients"] = asked
    return get_aggregator(robust.aggregator, **settings)
