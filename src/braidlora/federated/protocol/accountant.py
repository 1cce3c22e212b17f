"""What has been spent: ε of everything that was released, by the package dp-accounting."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from braidlora.errors import ConfigError

_LOOSE = 50.0  # above this ε the tight accountant takes minutes, and the number says "no privacy" either way
_STEP = 1e-3  # of the privacy loss; rounded up, and fine enough for four digits of ε
ONE_CLIENT, ITS_ROWS = "add or remove one client", "replace the rows of one client"


@dataclass(frozen=True)
class Release:
    """Noise that someone has seen, or may have.

    Args:
        round: the round it belongs to; a repeated round is released twice.
        what: the `aggregate`, which all receive; or what clients `sent` to the server, with their own noise.
        noise_multiplier: z.
        sampling: q.
        clients: with the noise at the clients, those whose noise is in it.
        secret: whether the noise came from the operating system's entropy.
    """

    round: int
    what: Literal["aggregate", "sent"]
    noise_multiplier: float
    sampling: float
    clients: tuple[str, ...] = ()
    secret: bool = True


@dataclass(frozen=True)
class Spent:
    """ε at δ; None stands for infinity.

    Args:
        epsilon: toward everyone but the server.
        epsilon_server: toward the server; None also if the server is trusted.
        neighbors: the two datasets that ε makes alike: with and without a client, or with other rows of a client.
        releases: how many there were, including those of rounds that were repeated.
        why_no_guarantee: why ε does not count; empty if it does.
    """

    epsilon: float | None
    epsilon_server: float | None
    neighbors: str
    releases: int
    why_no_guarantee: str


def check_accountant() -> None:
    """Raises ConfigError if dp-accounting is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            "federation.privacy needs the package dp-accounting, which computes ε: pip install 'braidlora[privacy]'."
        )


def spent(releases: Sequence[Release], delta: float, *, at_clients: bool) -> Spent:
    """ε of these releases together."""
    why = ""
    if any(not one.secret for one in releases):
        why = "the noise comes from federation.privacy.seed, and whoever knows the seed can remove it"
    elif any(not one.noise_multiplier for one in releases):
        why = "noise_multiplier is 0, so changes are clipped but no noise is added"
    if at_clients:
        others, server = _local(releases, delta)
        count = sum(one.what == "sent" for one in releases)
        return Spent(_number(others), _number(server), ITS_ROWS, count, why)
    return Spent(_number(_central(releases, delta)), None, ONE_CLIENT, len(releases), why)


def calibrated(epsilon: float, delta: float, sampling: float, rounds: int) -> float:
    """The least z, up to a relative 1e-3 above it, with which `rounds` releases spend at most ε.

    Raises:
        ConfigError: the accountant is not installed.
    """
    check_accountant()

    def enough(z: float) -> bool:
        return _central([Release(0, "aggregate", z, sampling)] * rounds, delta) <= epsilon

    high = 1.0
    while not enough(high):
        high *= 2.0
    low = high / 2.0
    while low > 1e-3 and enough(low):
        low, high = low / 2.0, low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _central(releases: Sequence[Release], delta: float) -> float:
    """Of Poisson-subsampled Gaussian mechanisms of sensitivity C and deviation z C, on adding or removing a client."""
    kinds = Counter((one.noise_multiplier, one.sampling) for one in releases)
    if not kinds:
        return 0.0
    if any(z == 0.0 for z, _ in kinds):
        return math.inf
    if all(q >= 1.0 for _, q in kinds):
        return _gaussian(math.fsum(n / z**2 for (z, _), n in kinds.items()), delta)
    import dp_accounting
    from dp_accounting import pld, rdp

    def composed(accountant: Any) -> float:
        for (z, q), count in sorted(kinds.items()):
            event: Any = dp_accounting.GaussianDpEvent(z)
            accountant.compose(event if q >= 1.0 else dp_accounting.PoissonSampledDpEvent(q, event), count)
        return float(accountant.get_epsilon(delta))

    with _quiet():
        bound = composed(rdp.RdpAccountant())
        return (
            bound
            if bound > _LOOSE
            else min(bound, composed(pld.PLDAccountant(value_discretization_interval=_STEP)))
        )


def _local(releases: Sequence[Release], delta: float) -> tuple[float, float]:
    """Toward other parties and toward the server, each for the client that has spent most.

    A client's change lies in a ball of radius C, so other rows move it by at most 2 C. The server sees it with the
    client's own noise z C. Others see a sum with the noise of n clients; one of these may look, and knows its own, so
    n − 1 count. Who takes part is treated as known, so sampling does not amplify.
    """
    server: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}
    for one in releases:
        variance = one.noise_multiplier**2
        if one.what == "aggregate":
            variance *= max(1, len(one.clients) - 1)
        for name in one.clients:
            seen = server if one.what == "sent" else others
            seen.setdefault(name, []).append(4.0 / variance if variance else math.inf)
    most = [max((math.fsum(one) for one in seen.values()), default=0.0) for seen in (others, server)]
    return _gaussian(most[0], delta), _gaussian(most[1], delta)


def _gaussian(squares: float, delta: float) -> float:
    """Of Gaussian mechanisms together, given Σ (sensitivity / deviation)²: exactly one with the root of that sum."""
    if squares == 0.0:
        return 0.0
    if math.isinf(squares):
        return math.inf
    import dp_accounting

    return float(dp_accounting.get_epsilon_gaussian(1.0 / math.sqrt(squares), delta))


def _number(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else epsilon


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the RDP accountant's notes on orders that it leaves out, which only make its bound larger."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
