"""Aggregators that tolerate some clients whose updates are malicious or broken.

They replace the weighted mean in rules that average updates of one shape (`RuleSpec.robust`); fed-alora-het applies
them to the products B2 B1. Median, trimmed mean and the Krum family count every client once, because a malicious client
could claim any number of rows. They keep all updates of a round, so memory grows with the number of clients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from braidlora.errors import ConfigError, FederationError
from braidlora.federated.protocol.mean import Aggregator, WeightedMean, accumulation_dtype


class NormClip:
    """Limits how far one client can move the aggregate: its change is scaled down to a norm of at most `max_norm`.

    The norm is over all of a client's tensors together, and of the change from what the clients started from, not of
    the weights. Memory is constant in the number of clients if that of `inner` is.

    Args:
        max_norm: largest norm of a change.
        inner: aggregates the clipped updates; the weighted mean by default.

    Raises:
        ConfigError: `max_norm` is not a finite number above 0.
    """

    measures_change = True

    def __init__(self, max_norm: float, inner: Aggregator | None = None) -> None:
        if not math.isfinite(max_norm) or max_norm <= 0:
            raise ConfigError(f"norm clip: max_norm is {max_norm!r}; it must be a finite number above 0")
        self.max_norm = max_norm
        self._inner: Aggregator = WeightedMean() if inner is None else inner

    def start(self, reference: Mapping[str, Tensor]) -> None:
        self._reference = dict(reference)
        self._inner.start(reference)

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        changes = {}
        for name, tensor in tensors.items():
            value, start = tensor.detach().to(accumulation_dtype(tensor)), self._reference.get(name)
            changes[name] = value if start is None else value - start.to(value.dtype)
        norm = math.sqrt(sum(float(change.double().square().sum()) for change in changes.values()))
        if norm <= self.max_norm:
            self._inner.add(tensors, weight)
            return
        clipped = {}
        for name, change in changes.items():
            shrunk, start = change * (self.max_norm / norm), self._reference.get(name)
            clipped[name] = shrunk if start is None else shrunk + start.to(shrunk.dtype)
        self._inner.add(clipped, weight)

    def finish(self) -> dict[str, Tensor]:
        self._reference = {}
        return self._inner.finish()


class _Kept:
    """Keeps all updates of a round, in float32 or better."""

    measures_change = False

    def start(self, reference: Mapping[str, Tensor]) -> None:
        self._updates: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        self._updates.append({n: t.detach().to(accumulation_dtype(t), copy=True) for n, t in tensors.items()})

    def _stacks(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's name and all clients' values of it, (n, …). The updates are freed along the way."""
        updates, self._updates = self._updates, []
        for name in list(updates[0]):
            yield name, torch.stack([update.pop(name) for update in updates])


class CoordinateMedian(_Kept):
    """The median of each coordinate (Yin et al., arXiv 1803.01498); for even n the mean of the middle two.

    Tolerates f malicious clients of n where n ≥ 2f + 1: none of fewer than three.
    """

    def finish(self) -> dict[str, Tensor]:
        result = {}
        for name, values in self._stacks():
            n = len(values)
            ordered = values.sort(0).values
            # Halved first: the sum of two large values could overflow.
            result[name] = ordered[(n - 1) // 2] / 2 + ordered[n // 2] / 2
        return result


class TrimmedMean(_Kept):
    """The mean of each coordinate without its ⌊trim · n⌋ smallest and as many largest values (arXiv 1803.01498).

    Tolerates f malicious clients of n where ⌊trim · n⌋ ≥ f.

    Args:
        trim: the share that is dropped at each end; 0 gives the unweighted mean.
        clients: how many take part in a round, if known.

    Raises:
        ConfigError: `trim` is not in [0, 0.5), or drops none of `clients`.
    """

    def __init__(self, trim: float, clients: int | None = None) -> None:
        if not 0.0 <= trim < 0.5:
            raise ConfigError(
                f"trimmed mean: trim is {trim!r}; it must be at least 0 and below 0.5, or nothing would be left"
            )
        self.trim = trim
        if clients is not None and self._drops_none(clients):
            raise ConfigError(
                f"trimmed mean: {trim:g} of {clients} clients drops no client; trim must be at least 1 / {clients} and "
                "below 0.5, or more clients must take part in a round"
            )

    def finish(self) -> dict[str, Tensor]:
        """Raises FederationError if too few clients took part for `trim` to drop any."""
        n = len(self._updates)
        if self._drops_none(n):
            self._updates = []
            raise FederationError(
                f"trimmed mean with trim = {self.trim:g} drops none of the {n} clients that took part, and so "
                "tolerates no malicious client. Keep the shared state of the last round, or raise trim or min_clients"
            )
        cut = self._cut(n)
        return {name: values.sort(0).values[cut : n - cut].mean(0) for name, values in self._stacks()}

    def _cut(self, n: int) -> int:
        return min(math.floor(self.trim * n + 1e-9), (n - 1) // 2)  # 0.29 · 100 is a little below 29

    def _drops_none(self, n: int) -> bool:
        return self.trim > 0 and self._cut(n) == 0


class Krum(_Kept):
    """The update closest to its n − f − 2 nearest neighbors, or the mean of the `keep` closest (Multi-Krum).

    Blanchard et al., NeurIPS 2017 (arXiv 1703.02757). Distances are over all of a client's tensors together.

    Args:
        f: how many clients may be malicious.
        clients: how many take part in a round.
        keep: 1 is Krum; more is Multi-Krum.

    Raises:
        ConfigError: f is negative, n < 2f + 3, or `keep` is not in 1 … n − f.
    """

    def __init__(self, f: int, clients: int, keep: int = 1) -> None:
        if f < 0:
            raise ConfigError(f"krum: f is {f}; it must be 0 or more")
        if clients < 2 * f + 3:
            raise ConfigError(
                f"krum: {clients} clients cannot tolerate f = {f}; it needs at least 2f + 3 = {2 * f + 3} clients, "
                f"or f of at most {max(0, (clients - 3) // 2)}"
            )
        if not 1 <= keep <= clients - f:
            raise ConfigError(f"krum: keep is {keep}; it must be between 1 and n − f = {clients - f}")
        self.f, self.clients, self.keep = f, clients, keep

    def finish(self) -> dict[str, Tensor]:
        """Raises FederationError if fewer than 2f + 3 clients took part."""
        updates, self._updates = self._updates, []
        n = len(updates)
        if n < 2 * self.f + 3:
            raise FederationError(
                f"krum with f = {self.f} needs at least {2 * self.f + 3} clients in a round; {n} took part. Keep the "
                "shared state of the last round, or raise min_clients"
            )
        distances = _squared_distances(updates)
        nearest = distances.sort(1).values[:, 1 : n - self.f - 1]  # the first is the client itself
        # Ties go to the client that was added first: clients are added in the order of their names.
        order = nearest.sum(1).sort(stable=True).indices[: min(self.keep, n - self.f)]
        mean = WeightedMean()
        mean.start({})
        for i in sorted(order.tolist()):
            mean.add(updates[i], 1.0)
        return mean.finish()


def _squared_distances(updates: list[dict[str, Tensor]]) -> Tensor:
    """‖uᵢ − uⱼ‖² (n, n) over all tensors, in float64, with zeros on the diagonal."""
    n = len(updates)
    total = torch.zeros(n, n, dtype=torch.float64)
    for name in updates[0]:
        rows = torch.stack([update[name].flatten() for update in updates]).double()
        rows -= rows.mean(0)  # does not change distances, and saves the products below from cancellation
        products = rows @ rows.T
        squares = products.diagonal()
        total += squares[:, None] + squares[None, :] - 2 * products
    return total.clamp_min_(0).fill_diagonal_(0)


def get_aggregator(name: str, **settings: Any) -> Aggregator:
    """`mean`, `norm-clip` (max_norm), `median`, `trimmed-mean` (trim, and clients if known), `krum` (f, clients),
    `multi-krum` (f, clients, keep).

    Raises:
        ConfigError: the name is unknown, or a setting is missing, unknown or infeasible.
    """
    makers = {
        "mean": WeightedMean,
        "norm-clip": NormClip,
        "median": CoordinateMedian,
        "trimmed-mean": TrimmedMean,
        "krum": Krum,
        "multi-krum": Krum,
    }
    if name not in makers:
        raise ConfigError(f"unknown aggregator {name!r}; expected one of {', '.join(makers)}")
    signature = inspect.signature(makers[name])
    try:
        signature.bind(**settings)
    except TypeError as error:
        known = ", ".join(signature.parameters) or "no settings"
        raise ConfigError(f"aggregator {name!r}: {error}; it takes {known}") from error
    return makers[name](**settings)
