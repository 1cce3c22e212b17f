"""The server's side of a round: sampled clients, payloads, which updates count, the new shared state. No transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from braidlora.config import FederatedConfig, FederationSection
from braidlora.errors import FederationError
from braidlora.federated.protocol.change import Extent, cosine, extent
from braidlora.federated.protocol.checks import listing, tensor_problems
from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.guard import Guard, capped_weights, quorum
from braidlora.federated.protocol.initial import start_factors
from braidlora.federated.protocol.momentum import advanced
from braidlora.federated.protocol.outliers import outliers, typical
from braidlora.federated.protocol.participation import warn_of_forgotten_ranks
from braidlora.federated.protocol.payload import Payload, make_payload, needs_catch_up
from braidlora.federated.protocol.privacy import NoisyMean
from braidlora.federated.protocol.recipe import make_aggregator, make_mechanism, make_rule
from braidlora.federated.protocol.seeds import sampled
from braidlora.federated.protocol.state import ServerState
from braidlora.federated.protocol.update import ClientUpdate

_WEIGHTED = ("mean", "norm-clip")  # aggregators in which a client's share matters


class Server:
    """Holds the shared state and advances it one round at a time: `open`, `take` for every update, `close`.

    Updates may arrive in any order: they are held until the round closes, and aggregated in the order of the clients'
    names.

    Args:
        config: the recipe.
        clients: all clients, by name.
        layers: the adapted layers of the model.
        head: the tensors that are trained in full, as all clients start with them.
        experiment: id of the federation.
        held: where updates wait until the round closes; default: a dict. A server that cannot hold a round's updates in
            memory gives a mapping that stores them elsewhere, such as a `Spool`.
        noise_multiplier: of a federation with `federation.privacy` that continues; default: what the recipe requires.

    Attributes:
        mechanism: of `federation.privacy`; None without it.
        changes: by client, what its update was in the round that was closed last: `weight`, its share of the aggregate
            (None if the aggregator does not weight, or with privacy), `norm` of the change against what it was sent,
            and `cosine` between that and the change of the shared state (None if either is zero or the round does not
            count).

    Raises:
        ConfigError: ranks or scalings do not fit the rule.
    """

    def __init__(
        self,
        config: FederatedConfig,
        clients: Mapping[str, ClientSpec],
        layers: Sequence[AdaptedLayer],
        head: Mapping[str, Tensor],
        *,
        experiment: str = "",
        held: MutableMapping[str, ClientUpdate] | None = None,
        noise_multiplier: float | None = None,
    ) -> None:
        self._config, self._clients = config.federation, clients
        self._seed = config.seed
        self._sampled_per_round = config.sampled_per_round(len(clients))
        ranks = [client.rank for client in clients.values()]
        largest_rank = max(ranks)
        self.mechanism = make_mechanism(config, len(clients), noise_multiplier)
        aggregator = make_aggregator(config, self._sampled_per_round, self.mechanism)
        self._noisy = aggregator if isinstance(aggregator, NoisyMean) else None
        self._rule = make_rule(config, head, aggregator, ranks)
        self.guard = Guard(
            self._rule,
            layers,
            {name: client.rank for name, client in clients.items()},
            scalings={name: client.scaling for name, client in clients.items()},
            dtype=getattr(torch, self._config.upload_dtype),
            shared_shapes={name: tuple(tensor.shape) for name, tensor in head.items()},
            steps_count=self._config.weights == "steps",
        )
        # What the first round's changes are measured from; it is never sent.
        self._start = {**start_factors(config, self._rule, layers, largest_rank), **head}
        self._fresh_size = math.sqrt(
            math.fsum(1.0 / (3.0 * one.in_features) for one in layers) / max(1, len(layers))
        )
        self._state = ServerState(experiment)
        self.changes: dict[str, dict[str, float | None]] = {}
        self._payloads: dict[bool, Mapping[str, Tensor]] = {}  # tensors that are the same for all clients
        self._round = 0
        self._held: MutableMapping[str, ClientUpdate] = {} if held is None else held
        self._weights: dict[str, float] = {}
        self._changed: dict[str, Extent] = {}
        self._steps: dict[str, tuple[int, int]] = {}  # by client, its steps (0 if not reported) and its rows
        self._left_out: dict[str, str] | None = None  # None until the round is settled
        warn_of_forgotten_ranks(self._rule, clients, self._sampled_per_round)

    def state(self) -> ServerState:
        """All that must be kept for the rounds to come."""
        return self._state

    def restore(self, state: ServerState) -> None:
        """Continue from a state that `state` gave."""
        self._state, self._payloads = state, {}

    def forget(self, clients: Iterable[str]) -> None:
        """These clients start from scratch, as clients that join do: none of their updates has counted."""
        gone = set(clients)
        kept = {name: round for name, round in self._state.counted.items() if name not in gone}
        self.restore(replace(self._state, counted=kept))

    def sample(self, round: int) -> list[str]:
        """The clients that take part in a round, in sorted order; a function of the recipe's seed and the round.

        With `federation.privacy` each is drawn independently, at random for every call: nobody may know the sample.
        """
        if self.mechanism is not None:
            return self.mechanism.sample(list(self._clients), round)
        return sampled(self._clients, self._sampled_per_round, self._seed, round)

    def payload(self, name: str, round: int) -> Payload:
        """What a client is sent for a round. Clients may share the tensors: they are read-only."""
        full = needs_catch_up(self._state, name)
        payload = make_payload(self._rule, self._state, self._clients[name], round, self._payloads.get(full))
        if not self._rule.spec.payload_by_rank:
            self._payloads[full] = payload.tensors  # in flora a decomposition of every layer
        return payload

    def open(self, round: int, clients: Iterable[str]) -> None:
        """Begin a round with these clients."""
        self.guard.open(round, clients)
        if self._noisy is not None:
            self._noisy.round = round
        self._rule.start(self._before, round)
        self._round, self._weights, self._changed, self.changes = round, {}, {}, {}
        self._left_out, self._steps = None, {}
        self._held.clear()

    def take(self, update: ClientUpdate) -> None:
        """Judge one update, and hold it until the round closes.

        Raises:
            UpdateRejected: with everything that is wrong with it. The server is unchanged: the round continues without
                it, and its client may send another.
        """
        self.guard.check(update)
        changed = extent(self._rule.change(update, self._before))
        self._held[update.client] = update
        # Last, so that what fails leaves no trace of the update.
        self._changed[update.client] = changed
        self._steps[update.client] = update.steps, update.num_examples
        self._weights[update.client] = {
            "rows": float(update.num_examples), "steps": float(update.steps), "uniform": 1.0
        }[self._config.weights]  # fmt: skip
        self.guard.accepted.add(update.client)

    def settle(self) -> dict[str, str]:
        """Once all updates are in, reject outliers: those whose change is out of proportion to the others'.

        Returns:
            the reasons, by client. There is no retry: the same training would give the same update.
        """
        if self._left_out is None:
            cap, sizes = self._config.change_cap, {name: one.size for name, one in self._changed.items()}
            # Robust aggregators and privacy bound a change themselves, and count on the number of replies.
            bounded = self._config.robust.aggregator != "mean" or self.mechanism is not None
            if cap is not None and not bounded:
                self._left_out = outliers(sizes, self._state.typical, cap, self._fresh_size, self._work())
            else:
                self._left_out = {}
            for name in self._left_out:
                del self._changed[name], self._weights[name], self._held[name], self._steps[name]
                self.guard.accepted.discard(name)
        return self._left_out

    def close(self) -> str:
        """End the round with a new shared state, or keep the old one and return why the round does not count."""
        self.settle()
        try:
            return self._close()
        finally:
            self._held.clear()

    def _close(self) -> str:
        count, clients = len(self._weights), len(self._weights) + len(self.guard.missing)
        weights = self._weights
        if self._rule.spec.shares:
            self.changes = {
                name: {"weight": None, "norm": changed.norm, "cosine": None}
                for name, changed in sorted(self._changed.items())
            }
        least = quorum(clients, min_clients=self.needed(), fraction=self._config.quorum)
        # With privacy even a round without clients counts: to skip it would tell who was drawn.
        if count < least and self.mechanism is None:
            return f"{count} of {clients} clients took part; the round needs {least}"
        if self._config.share_cap is not None:
            weights = capped_weights(weights, self._config.share_cap)
        try:
            for name in sorted(weights):
                self._rule.add(self._held[name], weights[name], judged=True)
            aggregate = self._rule.finish()
        except FederationError as error:
            return str(error)
        shared, velocity = self._advanced(aggregate)
        if problems := tensor_problems(shared, bounded=None):
            return (
                f"updates were within bounds, but their aggregate is not: {listing(problems)}. Look for a client whose "
                "training diverged"
            )
        self._measure(shared, weights)
        total = math.fsum(weights.values())
        # With privacy, shares would tell clients how many took part, and there is no usual size to compare with.
        private = self.mechanism is not None
        weighted = self._config.robust.aggregator in _WEIGHTED and not private
        sizes = {} if private else {name: one.size for name, one in self._changed.items()}
        self.restore(
            replace(
                self._state,
                shared=shared,
                shared_round=self._round,
                counted={**self._state.counted, **dict.fromkeys(weights, self._round)},
                typical=typical(sizes, self._work()) if sizes else None,
                weights={name: weights[name] / total for name in sorted(weights)} if weighted else {},
                velocity=velocity,
            )
        )
        return ""

    def _advanced(self, aggregate: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The shared state after the round, and the velocity behind it."""
        momentum, rate = self._config.server_momentum, self._config.server_learning_rate
        if not momentum and rate == 1.0:
            return aggregate, {}
        return advanced(
            self._before,
            aggregate,
            self._state.velocity,
            momentum=momentum,
            learning_rate=rate,
            settled=self._rule.settled(self._round),
        )

    @property
    def clipped(self) -> int | None:
        """How many changes of the last round the server clipped; None where it does not."""
        noisy = self._noisy
        return None if noisy is None or noisy.mechanism.at_clients else noisy.clipped

    def _work(self) -> dict[str, float]:
        """How long clients trained: their steps, or their rows if some do not report steps."""
        reported = all(steps for steps, _ in self._steps.values())
        return {name: float(steps if reported else rows) for name, (steps, rows) in self._steps.items()}

    @property
    def _before(self) -> Mapping[str, Tensor]:
        return self._state.shared or self._start

    def _measure(self, shared: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Fill in `changes`, one update at a time."""
        moved, total = dict(self._rule.moved(self._before, shared)), math.fsum(weights.values())
        length = extent(moved.items()).norm
        for name, one in self.changes.items():
            change = self._rule.change(self._held[name], self._before)
            one["cosine"] = cosine(change, self._changed[name].norm, moved, length)
            if self._config.robust.aggregator in _WEIGHTED and self.mechanism is None:
                one["weight"] = weights[name] / total

    def needed(self) -> int:
        """How many updates a round needs: `min_clients`, what the aggregator needs, what the cap on a share allows."""
        return _needed(self._config)


def needed_updates(config: FederatedConfig, clients: int) -> int:
    """How many updates a round of this recipe needs at least, given the number of clients."""
    federation = config.federation
    sampled = config.sampled_per_round(clients)
    return quorum(sampled, min_clients=_needed(federation), fraction=federation.quorum)


def _needed(federation: FederationSection) -> int:
    needed, robust = federation.min_clients, federation.robust
    if robust.f is not None:
        needed = max(needed, 2 * robust.f + 3)
    if robust.trim:
        needed = max(needed, math.ceil(1.0 / robust.trim - 1e-9))
    if federation.share_cap is not None:
        needed = max(needed, math.ceil(1.0 / federation.share_cap - 1e-9))
    return needed
