"""`Rule` aggregates many clients' adapters: it averages each factor by itself, and other rules derive from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from braidlora.errors import ConfigError, FederationError
from braidlora.federated.protocol.change import Change, difference
from braidlora.federated.protocol.checks import (
    MOST_ROWS,
    axis_problems,
    form_problems,
    header_problems,
    incomplete,
    is_positive,
    listing,
    name_problems,
    rank_axis,
    shape_problems,
    tensor_problems,
)
from braidlora.federated.protocol.factors import ZERO_AT_START, AdaptedLayer, factor_shapes, split
from braidlora.federated.protocol.mean import Aggregator, WeightedMean, accumulation_dtype, owned
from braidlora.federated.protocol.privacy import NoisyMean
from braidlora.federated.protocol.rules import rules_where
from braidlora.federated.protocol.rules.spec import RuleSpec, Turn
from braidlora.federated.protocol.update import ClientUpdate

Shapes = dict[str, tuple[int, ...]]


class Part(NamedTuple):
    """A client's part of the aggregate that it receives: its weight in it, and the tensors that it had sent."""

    weight: float
    sent: Mapping[str, Tensor]


class Rule:
    """One round after the other: `start(shared, round)`, `add(update)` for every client, `finish()`.

    Updates are weighted by n_i / Σn over those that were added. The order affects rounding only: a driver that adds in
    sorted order gets the same bytes whatever arrived first.

    Rounds are counted from 1. Their number matters to rules that alternate (`RuleSpec.turns`); 0 stands for all turns.

    Args:
        spec: what the rule is.
        r_intermediate: m, of factored adapters.
        also_share: full names of further tensors, such as a classification head, that travel and are averaged.
        aggregator: takes the place of the weighted mean (`braidlora.federated.protocol.robust`).

    Attributes:
        forgets: what a round without any client of the largest rank does to the ranks above those that took part, for a
            warning; empty where it does nothing to them.

    Raises:
        ConfigError: the rule does not work with these settings.
    """

    forgets: str = ""

    def __init__(
        self,
        spec: RuleSpec,
        *,
        r_intermediate: int = 16,
        also_share: Iterable[str] = (),
        aggregator: Aggregator | None = None,
    ) -> None:
        if aggregator is not None and not spec.robust:
            why = spec.not_robust or "that needs updates of one shape which are averaged"
            raise ConfigError(
                f"rule {spec.name!r} cannot use {type(aggregator).__name__}: {why}. It works with "
                f"{rules_where(lambda one: one.robust)}"
            )
        self.spec, self.r_intermediate = spec, r_intermediate
        self.also_share = frozenset(also_share)
        if self.also_share and not spec.shares:
            raise ConfigError(
                f"rule {spec.name!r} shares nothing; leave out also_share, or choose another rule"
            )
        self._aggregator: Aggregator = WeightedMean() if aggregator is None else aggregator
        self._shared: dict[str, Tensor] | None = None

    # The server's side of a round.

    def start(self, shared: Mapping[str, Tensor], round: int = 0) -> None:
        """Begin a round from the shared state, which may be empty in the first. Other tensors in it are ignored.

        Raises:
            FederationError: the aggregator measures changes from a start that is missing, or a rule that alternates was
                not given the round.
        """
        if self.spec.turns and round < 1:
            raise FederationError(
                f"{self.spec.name} alternates from round to round: call start(shared, round) with the round's number, "
                "counted from 1"
            )
        self._turn: Turn = self.spec.at(round)
        self._shared = self._select(shared, self.spec.keeps)
        # What an update must contain, as far as the shared state shows it; the first update shows the rest. (With
        # independently drawn A the first round starts from the common B alone.)
        self._expected: dict[str, tuple[int | None, ...]] = self._expectation(
            {name: tuple(tensor.shape) for name, tensor in self._shared.items()}
        )
        in_layers = self._expected.keys() - self.also_share
        self._all_expected = bool(in_layers) and not self._incomplete(self._expected)
        self._weight = 0.0
        self._first: ClientUpdate | None = None
        self._begin()

    def add(self, update: ClientUpdate, weight: float | None = None, *, judged: bool = False) -> None:
        """Add one client's update to the aggregate, which a rejected update does not change.

        Args:
            weight: takes the place of `num_examples`, e.g. where one client's share is capped; above 0.
            judged: whether a guard has passed the update, which knows more than `check`; it is then not checked again.

        Raises:
            FederationError: what is wrong with the update, got and expected, and whose it is.
        """
        if not judged:
            self.check(update, weight)
        share = float(update.num_examples if weight is None else weight)
        if self._first is None:
            # Names and shapes of the first update hold for those that the shared state does not determine.
            self._first = ClientUpdate(update.client, 1, {}, update.rank, float(update.scaling), update.round)
            if not self._all_expected:
                self._expected, self._all_expected = self._expectation_with(update), True
        self._accumulate(update, share)
        self._weight += share

    def check(self, update: ClientUpdate, weight: float | None = None) -> None:
        """Check an update as `add` does, without adding it; raises as `add`."""
        if self._shared is None:
            raise FederationError(f"{self.spec.name}: call start(shared) before add(update)")
        problems = self._problems(update)
        if weight is not None and not is_positive(weight, MOST_ROWS):
            problems.append(f"weight is {weight!r}; expected a number above 0 and at most 2**53")
        if problems:
            raise FederationError(
                f"update of client {update.client!r}, round {update.round}, rejected: " + "; ".join(problems)
            )

    def finish(self) -> dict[str, Tensor]:
        """The new shared state, in float32 or better. The rule then waits for the next `start`.

        Raises:
            FederationError: no update was added, or the aggregate is not finite.
        """
        name = self.spec.name
        if self._shared is None:
            raise FederationError(f"{name}: call start(shared) before finish()")
        if not self.spec.shares:
            self._shared = None
            return {}
        if self._first is None and not isinstance(self._aggregator, NoisyMean):
            raise FederationError(
                f"{name}: no client's update was added in this round; keep the shared state of the last round"
            )
        result = self._result()
        self._shared = None
        if problems := tensor_problems(result):
            raise FederationError(
                f"{name}: updates were finite, but their aggregate is not: {listing(problems)}. Keep the shared state "
                "of the last round, and look for a client whose training diverged"
            )
        return result

    def payload_for(
        self, shared: Mapping[str, Tensor], rank: int, scaling: float | None = None, round: int = 0
    ) -> dict[str, Tensor]:
        """What a client of this rank is sent, as copies.

        Args:
            scaling: the client's own; only flexlora needs it.
            round: the one that made `shared`, in which the client took part.
        """
        return {name: t.clone() for name, t in self._select(shared, self.spec.at(round).downloads).items()}

    def catch_up(
        self, shared: Mapping[str, Tensor], rank: int, scaling: float | None = None
    ) -> dict[str, Tensor]:
        """What a client is sent that did not take part in the round that made `shared`."""
        return self.payload_for(shared, rank, scaling)

    def settled(self, round: int) -> tuple[str, ...]:
        """The shared factors that a round does not aggregate: the other factor of a rule that alternates."""
        return tuple(set(self.spec.downloads) - set(self.spec.at(round).downloads))

    # What a round changes, for measuring, in the terms in which the rule aggregates.

    def change(self, update: ClientUpdate, before: Mapping[str, Tensor]) -> Change:
        """An update minus what its client was sent; a tensor that clients had no common start for is its own change.

        Args:
            before: the shared state, or in the first round what all clients start from.
        """
        for name, tensor in update.tensors.items():
            yield name, difference(tensor.detach(), before.get(name))

    def moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Change:
        """The shared state after a round minus the one before, in the terms of `change`."""
        for name, tensor in after.items():
            yield name, difference(tensor, before.get(name))

    def _heads_change(self, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Change:
        """Of the tensors in `also_share`."""
        for name, tensor in tensors.items():
            if name in self.also_share:
                yield name, difference(tensor.detach(), before.get(name))

    # The client's side.

    def outgoing(self, tensors: Mapping[str, Tensor], round: int = 0) -> dict[str, Tensor]:
        """The part of a client's adapter state that it sends."""
        return self._select(tensors, self.spec.at(round).uploads)

    def received(
        self,
        payload: Mapping[str, Tensor],
        rank: int,
        own: Mapping[str, Tensor] | None = None,
        *,
        full: bool = False,
        part: Part | None = None,
    ) -> dict[str, Tensor]:
        """The tensors that a client of this rank replaces in its state on receiving a payload.

        Args:
            own: the client's state.
            full: whether the payload came from `catch_up`, and so holds all that is shared.
            part: of the client in it; None if it did not take part in that round.
        """
        return dict(payload)

    def restart(
        self, tensors: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """A copy of a client's adapter state with the factors drawn again that restart in each round.

        Tensors are drawn in the order of their names, so a seeded generator gives the same values for the same names.
        """
        drawn = dict(tensors)
        for name in sorted(tensors):
            factor = split(name)[1]
            if factor not in self.spec.restarts:
                continue
            drawn[name] = torch.zeros_like(tensors[name])
            if factor not in ZERO_AT_START:
                nn.init.kaiming_uniform_(drawn[name], a=math.sqrt(5), generator=generator)
        return drawn

    # Shapes, from which the guard's expectations and the plan's bytes follow.

    def upload_shapes(self, layers: Iterable[AdaptedLayer], rank: int, round: int = 0) -> Shapes:
        """What a client of this rank sends: tensor names and shapes."""
        return self._shapes(layers, self.spec.at(round).uploads, rank)

    def download_shapes(
        self, layers: Iterable[AdaptedLayer], rank: int, ranks: Iterable[int], round: int = 0
    ) -> Shapes:
        """What a client of this rank is sent after a round in which clients of the given `ranks` took part."""
        return self._shapes(layers, self.spec.at(round).downloads, rank)

    def _shapes(self, layers: Iterable[AdaptedLayer], factors: Iterable[str], rank: int) -> Shapes:
        return dict(factor_shapes(layers, factors, rank, self.r_intermediate))

    # What rules differ in.

    def _begin(self) -> None:
        reference = self._reference()
        if self._aggregator.measures_change:
            self._check_reference(reference)
        self._aggregator.start(reference)
        if isinstance(self._aggregator, NoisyMean):
            assert self._all_expected, "the names of what is summed follow from the start"
            self._aggregator.expect({name: _known(shape) for name, shape in self._expected.items()})

    def _reference(self) -> dict[str, Tensor]:
        """What the clients' tensors are changes of; a B or a product that is missing in it starts at zero."""
        return self._shared or {}

    def _check_reference(self, reference: Mapping[str, Tensor]) -> None:
        known = {split(name)[1] for name in reference}
        nonzero = [
            factor
            for factor in self._turn.uploads
            if factor not in ZERO_AT_START and factor not in self.spec.multiplies
        ]
        unknown = [factor for factor in nonzero if factor not in known]
        unknown += sorted(self.also_share - reference.keys())
        if unknown:
            raise FederationError(
                f"{self.spec.name}: the change of {listing(unknown)} cannot be measured, because the shared state does "
                "not contain the clients' initial values. Start the first round with the tensors that all "
                "clients start from"
            )

    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        self._aggregator.add(update.tensors, weight)

    def _result(self) -> dict[str, Tensor]:
        # What is shared and did not travel up in this round stays: the other factor of a rule that alternates.
        kept = {
            name: owned(tensor.to(accumulation_dtype(tensor)))
            for name, tensor in (self._shared or {}).items()
            if name not in self.also_share and split(name)[1] not in self._turn.uploads
        }
        return {**kept, **self._aggregator.finish()}

    def _expectation(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
        """What updates must look like, by the shapes of the shared state or of the first update; None is any rank."""
        return {
            name: self._any_rank(name, shape)
            for name, shape in shapes.items()
            if split(name)[1] in self._turn.uploads or name in self.also_share
        }

    def _any_rank(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        axis = rank_axis(split(name)[1]) if self.spec.ranks == "any" else None
        return tuple(None if i == axis else size for i, size in enumerate(shape))

    def _expectation_with(self, update: ClientUpdate) -> dict[str, tuple[int | None, ...]]:
        """What is expected already, and for the rest what this update has."""
        if self._all_expected:
            return self._expected
        own = self._expectation({name: tuple(tensor.shape) for name, tensor in update.tensors.items()})
        # One factor in the shared state names the layer; without any it may hold a head alone.
        layers = {split(name)[0] for name in self._expected if name not in self.also_share}
        if layers:
            own = {n: shape for n, shape in own.items() if split(n)[0] in layers or n in self.also_share}
        return {**own, **self._expected}

    def _expected_of(self, update: ClientUpdate) -> dict[str, tuple[int | None, ...]]:
        return self._expectation_with(update)

    def _forms(self) -> tuple[tuple[str, ...], ...]:
        """The sets of factors that a layer may travel as; one of them must be complete."""
        return (self._turn.uploads,)

    def _incomplete(self, names: Iterable[str]) -> list[str]:
        """Tensors that are missing next to these: other factors of their layers, and those in `also_share`."""
        names = set(names)
        return incomplete(names, self._forms()) + sorted(self.also_share - names)

    def _select(self, tensors: Mapping[str, Tensor], factors: tuple[str, ...]) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in tensors.items() if split(n)[1] in factors or n in self.also_share}

    def _problems(self, update: ClientUpdate) -> list[str]:
        if problems := form_problems(update):
            return problems
        spec, uploads = self.spec, self._turn.uploads
        problems = header_problems(update) + name_problems(update.tensors, uploads, self.also_share)
        problems = (
            problems
            or tensor_problems(update.tensors, bounded=spec.multiplies)
            or axis_problems(update.tensors)
        )
        if problems:
            return problems
        if not update.tensors and uploads:
            return ["it holds no tensors"]
        expected = self._expected_of(update)
        problems = shape_problems(update.tensors, expected, update.rank)
        # Tensors that the shared state does not show are required by their layer.
        if not self._all_expected and (
            missing := [
                name for name in self._incomplete({*update.tensors, *expected}) if name not in expected
            ]
        ):
            problems.append(f"{listing(missing)} missing; {len(update.tensors)} tensors given")
        if problems and spec.ranks == "equal" and any("rank" in problem for problem in problems):
            problems.append(
                f"rule {spec.name!r} needs equal ranks; {rules_where(lambda one: one.ranks == 'any')} do not"
            )
        first = self._first
        if (
            spec.one_scaling
            and first is not None
            and not math.isclose(first.scaling, update.scaling, rel_tol=1e-9)
        ):
            problems.append(
                f"scaling is {update.scaling:g}, that of client {first.client!r} is {first.scaling:g}; rule "
                f"{spec.name!r} averages factors, which needs one scaling alpha / r for all clients"
            )
        return problems


def _known(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """A shape without any rank of a client's own, as sums have it."""
    assert None not in shape
    return tuple(size for size in shape if size is not None)
