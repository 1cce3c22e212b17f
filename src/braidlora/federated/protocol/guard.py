"""What an update must satisfy before it counts.

The server opens a round for the sampled clients, and has the guard judge every update before a rule receives it. A
rejected update costs its sender the round, and does not affect other clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from braidlora.errors import ConfigError, FederationError
from braidlora.federated.protocol.checks import (
    LARGEST,
    axis_problems,
    form_problems,
    header_problems,
    is_positive,
    listing,
    name_problems,
    shape_problems,
    tensor_problems,
)
from braidlora.federated.protocol.factors import AdaptedLayer, split
from braidlora.federated.protocol.rules import rules_where
from braidlora.federated.protocol.rules.rule import Rule
from braidlora.federated.protocol.update import ClientUpdate


class UpdateRejected(FederationError):  # noqa: N818 (a verdict on one update)
    """One client's update does not count; `problems` says why, `client` and `round` whose it is."""

    def __init__(self, client: str, round: int, problems: list[str]) -> None:
        self.client, self.round, self.problems = client, round, problems
        super().__init__(f"client {client!r}, round {round}, rejected: " + "; ".join(problems))


class Guard:
    """Judges the updates of a round. What each client must send follows from the model's layers and the rule.

    Args:
        rule: whose allow-list applies.
        layers: the adapted layers of the model.
        ranks: rank of every client of the federation.
        scalings: scaling of every client; by default scalings are only checked to be numbers above 0.
        dtype: the one that updates travel in; by default any of float32, float16, bfloat16 and float64.
        shared_shapes: shapes of the tensors in the rule's `also_share`.
        steps_count: whether an update's steps are its weight, and so must be reported.

    Attributes:
        accepted: clients whose update counts in the open round.

    Raises:
        ConfigError: clients of different ranks under a rule that needs equal ones, different scalings under one that
            averages factors, or no shape for a tensor in `also_share`.
    """

    def __init__(
        self,
        rule: Rule,
        layers: Iterable[AdaptedLayer],
        ranks: Mapping[str, int],
        *,
        scalings: Mapping[str, float] | None = None,
        dtype: torch.dtype | None = None,
        shared_shapes: Mapping[str, tuple[int, ...]] | None = None,
        steps_count: bool = False,
    ) -> None:
        self._rule, self._dtype = rule, dtype
        self._steps_count = steps_count
        self._layers = tuple(layers)
        self._ranks, self._scalings = dict(ranks), dict(scalings or {})
        self._shared_shapes = dict(shared_shapes or {})
        self._by_rank: dict[int, dict[str, tuple[int, ...]]] = {}  # what each must send in the open round
        self._round: int | None = None
        self._sampled: frozenset[str] = frozenset()
        self.accepted: set[str] = set()
        self._check_federation()

    def open(self, round: int, clients: Iterable[str]) -> None:
        """Begin a round, in which each of these clients may send one update.

        Raises:
            ConfigError: a client is not of this federation.
        """
        sampled = frozenset(clients)
        unknown = sorted(sampled - self._ranks.keys())
        if unknown:
            raise ConfigError(
                f"unknown client {listing(unknown)}; the federation's clients are {listing(sorted(self._ranks))}"
            )
        self._round, self._sampled, self.accepted = round, sampled, set()
        self._by_rank = {}

    def check(self, update: ClientUpdate) -> None:
        """Pass an update, or say why not. The caller that takes it adds its client to `accepted`.

        A client whose update was rejected may send another in the same round.

        Raises:
            UpdateRejected: with everything that is wrong with the update.
            FederationError: no round is open.
        """
        if self._round is None:
            raise FederationError("guard: call open(round, clients) before check(update)")
        problems = form_problems(update) or self._sender_problems(update)
        if not problems:
            uploads, also = self._rule.spec.at(self._round).uploads, self._rule.also_share
            problems = header_problems(update) + self._terms_problems(update)
            problems += name_problems(update.tensors, uploads, also)
            problems += tensor_problems(update.tensors, self._dtype, bounded=None)
            rank = self._ranks[update.client]
            expected = self._expected(rank)
            # Foreign names and values that are not tensors are named above already; the latter are not missing.
            own = {
                name: tensor
                for name, tensor in update.tensors.items()
                if isinstance(tensor, Tensor) and (split(name)[1] in uploads or name in also)
            }
            required = {n: s for n, s in expected.items() if n in own or n not in update.tensors}
            problems += axis_problems(own) or shape_problems(own, required, rank)
        if problems:
            raise UpdateRejected(update.client, update.round, problems)

    @property
    def missing(self) -> list[str]:
        """Sampled clients without an update that counts."""
        return sorted(self._sampled - self.accepted)

    def _sender_problems(self, update: ClientUpdate) -> list[str]:
        if update.client not in self._ranks:
            return ["it is not a client of this federation"]
        if update.round != self._round:
            return [f"the update is for round {update.round!r}; round {self._round} is open"]
        if update.client not in self._sampled:
            return ["it was not sampled in this round"]
        if update.client in self.accepted:
            return ["an update of this client already counts in this round"]
        return []

    def _terms_problems(self, update: ClientUpdate) -> list[str]:
        problems = []
        rank, scaling = self._ranks[update.client], self._scalings.get(update.client)
        if self._steps_count and update.steps == 0:
            problems.append("steps is 0; expected at least 1, because clients are weighted by their steps")
        if update.rank not in (0, rank):
            problems.append(f"rank is {update.rank!r}; expected {rank}")
        if (
            scaling is not None
            and is_positive(update.scaling, LARGEST)
            and not math.isclose(update.scaling, scaling, rel_tol=1e-9)
        ):
            problems.append(f"scaling is {update.scaling:g}; expected {scaling:g}")
        return problems

    def _expected(self, rank: int) -> dict[str, tuple[int, ...]]:
        if rank not in self._by_rank:
            shapes = self._rule.upload_shapes(self._layers, rank, self._round or 0)
            self._by_rank[rank] = {**shapes, **{n: self._shared_shapes[n] for n in self._rule.also_share}}
        return self._by_rank[rank]

    def _check_federation(self) -> None:
        spec = self._rule.spec
        if spec.ranks == "equal" and len(set(self._ranks.values())) > 1:
            raise ConfigError(
                f"rule {spec.name!r} needs one rank for all clients; given: {_pairs(self._ranks)}. "
                f"{rules_where(lambda one: one.ranks == 'any')} allow different ranks"
            )
        if spec.one_scaling and len({round(s, 12) for s in self._scalings.values()}) > 1:
            raise ConfigError(
                f"rule {spec.name!r} averages factors, which needs one scaling alpha / r for all clients; given: "
                f"{_pairs(self._scalings)}. Set alpha in proportion to the rank"
            )
        unknown = sorted(self._rule.also_share - self._shared_shapes.keys())
        if unknown:
            raise ConfigError(f"also_share: no tensor {listing(unknown)} in the model; check the name")


def capped_weights(num_examples: Mapping[str, float], cap: float) -> dict[str, float]:
    """Weights min(nᵢ, c) with c such that no client has a share above `cap`. For `Rule.add(update, weight)`.

    Raises:
        ConfigError: `cap` is not in (0, 1], or so small that the shares could not sum to 1.
    """
    if not 0.0 < cap <= 1.0:
        raise ConfigError(f"cap on a client's share is {cap!r}; it must be above 0 and at most 1")
    n = len(num_examples)
    if n and cap * n < 1.0 - 1e-12:
        raise ConfigError(
            f"cap on a client's share is {cap:g}; with {n} clients it must be at least {1 / n:g}"
        )
    # The j largest are capped at c = cap · (j c + rest), so c = cap · rest / (1 − j · cap).
    ordered = sorted(num_examples.values(), reverse=True)
    limit = math.inf
    rest = float(sum(ordered))
    for j, largest in enumerate([*ordered, 0]):
        left = 1.0 - j * cap
        if left <= 1e-12:
            limit = float(ordered[j - 1])  # all shares are `cap`: the smallest capped number serves for all
            break
        if largest <= cap * rest / left:
            limit = cap * rest / left if j else math.inf
            break
        rest -= largest
    return {client: min(float(rows), limit) for client, rows in num_examples.items()}


def quorum(sampled: int, *, min_clients: int = 1, fraction: float = 0.0) -> int:
    """How many updates a round needs to count: `min_clients`, and `fraction` of the sample."""
    return max(1, min_clients, math.ceil(fraction * sampled - 1e-9))


def _pairs(values: Mapping[str, float]) -> str:
    return listing([f"{name}: {value:g}" for name, value in sorted(values.items())])
