"""The server's side of a round: whom to ask, what to send, what counts, and the new shared state. No transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braidlora.config import FederatedConfig
from braidlora.errors import FederationError
from braidlora.federated.protocol.change import Extent, cosine, extent
from braidlora.federated.protocol.checks import listing, tensor_problems
from braidlora.federated.protocol.client import Payload
from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.guard import Guard, capped_weights, has_quorum
from braidlora.federated.protocol.initial import start_factors
from braidlora.federated.protocol.mean import Aggregator
from braidlora.federated.protocol.outliers import Typical, outliers, typical
from braidlora.federated.protocol.participation import warn_of_forgotten_ranks
from braidlora.federated.protocol.robust import get_aggregator
from braidlora.federated.protocol.rules import make_rule
from braidlora.federated.protocol.update import ClientUpdate
from braidlora.federated.site.clients import Client, derive_seed


class Server:
    """Holds the shared state and moves it by one round at a time: `open`, `take` for every update, `close`.

    Updates may come in any order: they are held until the round closes, and aggregated in the order of the clients'
    names.

    Args:
        config: the recipe.
        clients: all clients, by name.
        layers: the adapted layers of the model.
        head: the tensors that are trained in full, as all clients start with them.
        held: where updates wait for the end of their round; a dict by default. Whoever must not keep all of a round's
            updates in memory gives something that puts them elsewhere, such as a `Spool`.

    Attributes:
        shared: the shared state; empty before a round has counted.
        since: the round that it comes from; 0 before any.
        counted: by client, the last round in which its update counted.
        typical: the median size of the clients' changes (`changes`) in the last round that counted, and of the work
            behind them; None before any.
        changes: by client, what its update was in the round that was closed last: `weight`, its share of the aggregate
            (None where the aggregator counts otherwise), `norm` of the change against what it was sent, and `cosine`
            between that and the change of the shared state (None where either is zero or the round does not count).

    Raises:
        ConfigError: ranks or scalings do not fit the rule.
    """

    def __init__(
        self,
        config: FederatedConfig,
        clients: Mapping[str, Client],
        layers: Sequence[AdaptedLayer],
        head: Mapping[str, Tensor],
        held: MutableMapping[str, ClientUpdate] | None = None,
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
            steps_count=self._config.weights == "steps",
        )
        # What the first round's changes are measured from. It is not sent to anybody.
        self._start = {**start_factors(config, self._rule, layers, largest_rank), **head}
        self._fresh_size = math.sqrt(
            math.fsum(1.0 / (3.0 * one.in_features) for one in layers) / max(1, len(layers))
        )
        self.shared: dict[str, Tensor] = {}
        self.since = 0
        self.counted: dict[str, int] = {}
        self.typical: Typical | None = None
        self.changes: dict[str, dict[str, float | None]] = {}
        self._made: dict[tuple[int, bool], Mapping[str, Tensor]] = {}  # payloads that are the same for all
        self._round = 0
        self._held: MutableMapping[str, ClientUpdate] = {} if held is None else held
        self._weights: dict[str, float] = {}
        self._changed: dict[str, Extent] = {}
        self._steps: dict[str, tuple[int, int]] = {}  # by client, its steps (0 where not told) and its rows
        self._left_out: dict[str, str] | None = None  # None until the round is settled
        warn_of_forgotten_ranks(self._rule, clients, self._asked_per_round)

    def sample(self, round: int) -> list[str]:
        """The clients to ask in a round, in sorted order; a function of the recipe's seed and the round alone."""
        return sampled(self._clients, self._asked_per_round, self._seed, round)

    def payload(self, name: str, round: int) -> Payload:
        """What a client is sent for a round. The tensors may be those that others are sent: they are for reading."""
        client = self._clients[name]
        # Who missed the last round that counted has not got its payload, which builds on the one before in flora.
        whole = self.since > 0 and self.counted.get(name, 0) != self.since
        make = self._rule.catch_up if whole else partial(self._rule.payload_for, round=self.since)
        if self._rule.spec.payload_by_rank:
            return Payload(round, self.since, make(self.shared, client.rank, client.scaling), whole)
        if (self.since, whole) not in self._made:  # in flora a decomposition of every layer
            self._made[self.since, whole] = make(self.shared, client.rank, client.scaling)
        return Payload(round, self.since, self._made[self.since, whole], whole)

    def open(self, round: int, asked: Iterable[str]) -> None:
        """Begin a round with these clients."""
        self.guard.open(round, asked)
        self._rule.start(self._before, round)
        self._round, self._weights, self._changed, self.changes = round, {}, {}, {}
        self._left_out, self._steps = None, {}
        self._held.clear()

    def take(self, update: ClientUpdate) -> None:
        """Judge one update, and hold it until the round closes.

        Raises:
            FederationError: with everything that is wrong with it (UpdateRejected where the guard says so). Nothing
                has changed then: the round goes on without it, and its client may send another.
        """
        self.guard.judge(update)
        self._rule.check(update, values=False)
        changed = extent(self._rule.change(update, self._before))
        self._held[update.client] = update
        # Last, so that what fails leaves no trace of the update.
        self._changed[update.client] = changed
        self._steps[update.client] = update.steps, update.num_examples
        self._weights[update.client] = {
            "rows": float(update.num_examples), "steps": float(update.steps), "uniform": 1.0
        }[self._config.weights]  # fmt: skip
        self.guard.accept(update.client)

    def settle(self) -> dict[str, str]:
        """Once all updates are in, leave out those whose change is out of all proportion to the others'.

        Returns:
            why, by client. It is not asked again: the same training would give the same.
        """
        if self._left_out is None:
            cap, sizes = self._config.change_cap, {name: one.size for name, one in self._changed.items()}
            # Robust aggregators bound a change themselves, and count on the number of replies.
            if cap is not None and self._config.robust.aggregator == "mean":
                self._left_out = outliers(sizes, self.typical, cap, self._fresh_size, self._work())
            else:
                self._left_out = {}
            for name in self._left_out:
                del self._changed[name], self._weights[name], self._held[name], self._steps[name]
                self.guard.withdraw(name)
        return self._left_out

    def close(self) -> str:
        """End the round with a new shared state, or leave the old one and say why the round does not count."""
        self.settle()
        try:
            return self._close()
        finally:
            self._held.clear()

    def _close(self) -> str:
        count, asked = len(self._weights), len(self._weights) + len(self.guard.missing)
        weights = self._weights
        if self._rule.spec.shares:
            self.changes = {
                name: {"weight": None, "norm": changed.norm, "cosine": None}
                for name, changed in sorted(self._changed.items())
            }
        if not has_quorum(count, asked, min_clients=self.needed(), fraction=self._config.quorum):
            least = max(self.needed(), math.ceil(self._config.quorum * asked - 1e-9))
            return f"{count} of {asked} clients took part; the round needs {least}"
        if self._config.share_cap is not None:
            weights = capped_weights(weights, self._config.share_cap)
        try:
            for name in sorted(weights):
                self._rule.add(self._held[name], weights[name], judged=True)
            shared = self._rule.finish()
        except FederationError as error:
            return str(error)
        if problems := tensor_problems(shared, bounded=None):
            return (
                f"updates were within bounds, but their aggregate is not: {listing(problems)}. Look for a client whose "
                "training diverged"
            )
        self._measure(shared, weights)
        self.shared = shared
        self.since, self._made = self._round, {}
        self.counted |= dict.fromkeys(weights, self._round)
        self.typical = typical({name: one.size for name, one in self._changed.items()}, self._work())
        return ""

    def _work(self) -> dict[str, float]:
        """How long clients trained: their steps, or their rows where some do not tell."""
        told = all(steps for steps, _ in self._steps.values())
        return {name: float(steps if told else rows) for name, (steps, rows) in self._steps.items()}

    @property
    def _before(self) -> dict[str, Tensor]:
        return self.shared or self._start

    def _measure(self, shared: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Fill in `changes`, one update at a time."""
        moved, total = dict(self._rule.moved(self._before, shared)), math.fsum(weights.values())
        length = extent(moved.items()).norm
        for name, one in self.changes.items():
            change = self._rule.change(self._held[name], self._before)
            one["cosine"] = cosine(change, self._changed[name].norm, moved, length)
            if self._config.robust.aggregator in ("mean", "norm-clip"):
                one["weight"] = weights[name] / total

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
