"""What every aggregation rule declares and does."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

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
from braidlora.federated.protocol.factors import AdaptedLayer, Redraw, factor_shapes, redraw, split
from braidlora.federated.protocol.mean import Aggregator, WeightedMean
from braidlora.federated.protocol.update import ClientUpdate

Shapes = dict[str, tuple[int, ...]]


class Rule(ABC):
    """One way to make many clients' adapters one: `start(shared)`, `add(update)` for each, `finish()`.

    Updates are weighted by n_i / Σn over those that were added. The order matters to rounding only; a driver that adds
    in sorted order gets the same bytes whatever arrived first.

    Class attributes declare the rule:
        name: as `get_rule` knows it.
        trains: factors that a client trains.
        uploads, downloads: factors that may travel up and down, the allow-list.
        keeps: factors that make up the server's shared state.
        ranks: "equal" for all clients, or "any".
        one_scaling: whether factors are averaged, which needs the same scaling s for all clients.
        exact: whether the aggregate's effective update is Σ pᵢ ΔWᵢ. None where the question does not arise, because
            a factor stays with its client.
        streams: whether the server's memory is constant in the number of clients.
        restarts: factors that a client draws anew at the start of each round, and how.
        needs_shared_init: whether all clients must draw one A from a common seed, for it never travels.
        multiplies: factors of which the server forms products, so that their values are bounded.
        payload_by_rank: whether clients of different ranks or scalings are sent different tensors.
        accepts_robust: whether an order-statistic or clipping aggregator may take the place of the mean.

    Args:
        also_share: full names of further tensors, such as a classification head, that travel and are averaged.
        aggregator: takes the place of the weighted mean (`braidlora.federated.protocol.robust`).

    Raises:
        ConfigError: the rule cannot work with this aggregator.
    """

    name: ClassVar[str]
    trains: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    uploads: tuple[str, ...]
    downloads: ClassVar[tuple[str, ...]]
    keeps: ClassVar[tuple[str, ...]]
    ranks: ClassVar[Literal["equal", "any"]] = "equal"
    one_scaling: ClassVar[bool] = True
    exact: ClassVar[bool | None] = None
    streams: ClassVar[bool] = True
    restarts: ClassVar[Mapping[str, Redraw]] = {}
    needs_shared_init: ClassVar[bool] = False
    multiplies: ClassVar[tuple[str, ...]] = ()
    payload_by_rank: ClassVar[bool] = False
    accepts_robust: ClassVar[bool] = True

    def __init__(self, *, also_share: Iterable[str] = (), aggregator: Aggregator | None = None) -> None:
        if aggregator is not None and not self.accepts_robust:
            raise ConfigError(
                f"rule {self.name!r} cannot use {type(aggregator).__name__}: that needs updates of one shape which are "
                "averaged, as in fedit, ffa-lora, fedsa-lora, fed-alora and fed-alora-het"
            )
        self.also_share = frozenset(also_share)
        self._aggregator: Aggregator = WeightedMean() if aggregator is None else aggregator
        self._shared: dict[str, Tensor] | None = None

    # The server's side of a round.

    def start(self, shared: Mapping[str, Tensor]) -> None:
        """Begin a round from the shared state, which may be empty in the first. Tensors of no concern are ignored.

        Raises:
            FederationError: the aggregator measures changes, and what they are measured from is missing.
        """
        self._shared = self._own(shared, self.keeps)
        # All that an update must hold, where the shared state tells; otherwise the first update tells the rest. (With
        # independently drawn A the first round starts from the common B alone.)
        self._expected: dict[str, tuple[int | None, ...]] = self._expectation(
            {name: tuple(tensor.shape) for name, tensor in self._shared.items()}
        )
        layers_told = self._expected.keys() - self.also_share
        self._all_expected = bool(layers_told) and not self._incomplete(self._expected)
        self._weight = 0.0
        self._first: ClientUpdate | None = None
        self._begin()

    def add(self, update: ClientUpdate, weight: float | None = None, *, judged: bool = False) -> None:
        """Take one client's update into the aggregate. A refused update leaves the aggregate as it was.

        Args:
            weight: takes the place of `num_examples`, e.g. where one client's share is capped; above 0.
            judged: whether `check` has let this very update pass since `start`; it is not judged again then.

        Raises:
            FederationError: what is wrong with the update, got and expected, and whose it is.
        """
        if not judged:
            self.check(update, weight)
        share = float(update.num_examples if weight is None else weight)
        if self._first is None:
            # Names and shapes of the first reply stand for those the shared state does not fix.
            self._first = ClientUpdate(update.client, 1, {}, update.rank, float(update.scaling), update.round)
            if not self._all_expected:
                self._expected, self._all_expected = self._expectation_with(update), True
        self._accumulate(update, share)
        self._weight += share

    def check(self, update: ClientUpdate, weight: float | None = None, *, values: bool = True) -> None:
        """Judge an update as `add` does, and take nothing. What passes here `add` takes.

        Args:
            values: whether to look at the numbers in the tensors as well; False where a guard has done so.

        Raises:
            FederationError: what is wrong with the update, got and expected, and whose it is.
        """
        if self._shared is None:
            raise FederationError(f"{self.name}: call start(shared) before add(update)")
        problems = self._problems(update, values)
        if weight is not None and not is_positive(weight, MOST_ROWS):
            problems.append(f"weight is {weight!r}; expected a number above 0 and at most 2**53")
        if problems:
            raise FederationError(
                f"update of client {update.client!r}, round {update.round}, refused: " + "; ".join(problems)
            )

    def finish(self) -> dict[str, Tensor]:
        """The new shared state, in float32 or better. The rule then awaits the next `start`.

        Raises:
            FederationError: no update was added, or the aggregate is not finite.
        """
        if self._shared is None:
            raise FederationError(f"{self.name}: call start(shared) before finish()")
        if self._first is None:
            raise FederationError(
                f"{self.name}: no client's update was added in this round; keep the shared state of the last round"
            )
        result = self._result()
        self._shared = None
        problems = tensor_problems(result)
        if problems:
            raise FederationError(
                f"{self.name}: updates were finite, but their aggregate is not: {listing(problems)}. Keep the shared "
                "state of the last round, and look for a client whose training diverged"
            )
        return result

    def payload_for(
        self, shared: Mapping[str, Tensor], rank: int, scaling: float | None = None
    ) -> dict[str, Tensor]:
        """What a client of this rank is sent, as copies. `scaling` is the client's own; only flexlora needs it."""
        return {name: tensor.clone() for name, tensor in self._own(shared, self.downloads).items()}

    def catch_up(
        self, shared: Mapping[str, Tensor], rank: int, scaling: float | None = None
    ) -> dict[str, Tensor]:
        """What a client is sent that missed the last round's payload; the same as any other's but in flora."""
        return self.payload_for(shared, rank, scaling)

    # What a round changes, to be measured: in the terms that the rule aggregates in.

    def change(self, update: ClientUpdate, before: Mapping[str, Tensor]) -> Change:
        """An update against what its client was sent. A tensor that clients had no common start for counts whole.

        Args:
            before: the shared state, or in the first round what all clients start from.
        """
        for name, tensor in update.tensors.items():
            yield name, difference(tensor.detach(), before.get(name))

    def moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Change:
        """The shared state after a round against the one before, in the terms of `change`."""
        for name, tensor in after.items():
            yield name, difference(tensor, before.get(name))

    def _heads_change(self, tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Change:
        """Of what is shared by its full name."""
        for name, tensor in tensors.items():
            if name in self.also_share:
                yield name, difference(tensor.detach(), before.get(name))

    # The client's side.

    def outgoing(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a client's adapter state, what it sends."""
        return self._own(tensors, self.uploads)

    def lets_up(self, name: str) -> bool:
        """Whether a tensor of this name may leave a client."""
        return split(name)[1] in self.uploads or name in self.also_share

    def received(
        self, payload: Mapping[str, Tensor], rank: int, own: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """A payload as a client of this rank puts it into its adapter.

        Args:
            own: the client's adapter state, for what the payload may leave as it is (zero-padding by rank).
        """
        return dict(payload)

    def restart(
        self, tensors: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """A client's adapter state with the factors that start anew each round drawn again."""
        return redraw(tensors, self.restarts, generator)

    # Shapes, from which the guard's expectations and the plan's bytes follow.

    def upload_shapes(self, layers: Iterable[AdaptedLayer], rank: int, r_intermediate: int = 16) -> Shapes:
        """What a client of this rank sends: tensor names and shapes."""
        return dict(factor_shapes(layers, self.uploads, rank, r_intermediate))

    def download_shapes(
        self, layers: Iterable[AdaptedLayer], rank: int, ranks: Iterable[int], r_intermediate: int = 16
    ) -> Shapes:
        """What a client of this rank is sent after a round in which clients of the given `ranks` took part."""
        return dict(factor_shapes(layers, self.downloads, rank, r_intermediate))

    # What rules differ in.

    def _begin(self) -> None:
        reference = self._reference()
        if self._aggregator.measures_change:
            self._check_reference(reference)
        self._aggregator.start(reference)

    def _reference(self) -> dict[str, Tensor]:
        """What the clients' tensors are changes of; a B or a product that is not in it starts at zero."""
        return self._shared or {}

    def _check_reference(self, reference: Mapping[str, Tensor]) -> None:
        unknown = sorted(self.also_share - reference.keys())
        if "lora_A" in self.uploads and not any(split(name)[1] == "lora_A" for name in reference):
            unknown.insert(0, "lora_A")
        if unknown:
            raise FederationError(
                f"{self.name}: the change of {listing(unknown)} cannot be measured, for the shared state does not hold "
                "what the clients start from. Start the first round with the tensors that all clients start from"
            )

    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        self._aggregator.add(update.tensors, weight)

    def _result(self) -> dict[str, Tensor]:
        return self._aggregator.finish()

    def _expectation(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
        """What updates must look like, by the shared state's shapes or the first update's; None is any rank."""
        return {name: self._open(name, shape) for name, shape in shapes.items() if self.lets_up(name)}

    def _open(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        axis = rank_axis(split(name)[1]) if self.ranks == "any" else None
        return tuple(None if i == axis else size for i, size in enumerate(shape))

    def _expectation_with(self, update: ClientUpdate) -> dict[str, tuple[int | None, ...]]:
        """What is expected already, and of the rest what this update has."""
        if self._all_expected:
            return self._expected
        own = self._expectation({name: tuple(tensor.shape) for name, tensor in update.tensors.items()})
        # One factor in the shared state names the layer; of the others a head may be all that it holds.
        layers = {split(name)[0] for name in self._expected if name not in self.also_share}
        if layers:
            own = {n: shape for n, shape in own.items() if split(n)[0] in layers or n in self.also_share}
        return {**own, **self._expected}

    def _expected_of(self, update: ClientUpdate) -> dict[str, tuple[int | None, ...]]:
        return self._expectation_with(update)

    def _forms(self) -> tuple[tuple[str, ...], ...]:
        """The sets of factors that a layer may travel as; one of them must be whole."""
        return (self.uploads,)

    def _incomplete(self, names: Iterable[str]) -> list[str]:
        """Tensors that are missing beside these: further factors of their layers, and what is shared by full name."""
        names = set(names)
        return incomplete(names, self._forms()) + sorted(self.also_share - names)

    def _own(self, tensors: Mapping[str, Tensor], factors: tuple[str, ...]) -> dict[str, Tensor]:
        return {n: t.detach() for n, t in tensors.items() if split(n)[1] in factors or n in self.also_share}

    def _problems(self, update: ClientUpdate, values: bool) -> list[str]:
        if problems := form_problems(update):
            return problems
        problems = header_problems(update) + name_problems(update.tensors, self.uploads, self.also_share)
        problems = (
            problems
            or (tensor_problems(update.tensors, bounded=self.multiplies) if values else [])
            or axis_problems(update.tensors)
        )
        if problems:
            return problems
        if not update.tensors and (self.uploads or self.also_share):
            return ["it holds no tensors"]
        expected = self._expected_of(update)
        problems = shape_problems(update.tensors, expected, update.rank)
        # What `expected` does not ask for, because the shared state has not told of it, is asked for by the layer.
        if not self._all_expected and (
            missing := [
                name for name in self._incomplete({*update.tensors, *expected}) if name not in expected
            ]
        ):
            problems.append(f"{listing(missing)} missing; {len(update.tensors)} tensors given")
        if problems and self.ranks == "equal" and any("rank" in problem for problem in problems):
            problems.append(
                f"rule {self.name!r} needs equal ranks; zero-padding, flora, flexlora and fed-alora-het do not"
            )
        first = self._first
        if self.one_scaling and first is not None and not _same(first.scaling, update.scaling):
            problems.append(
                f"scaling is {update.scaling:g}, that of client {first.client!r} is {first.scaling:g}; rule "
                f"{self.name!r} averages factors, which needs one scaling alpha / r for all clients"
            )
        return problems


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * max(one, other)
