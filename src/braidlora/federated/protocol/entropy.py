"""Random numbers for privacy: from the operating system, which nobody can predict, or from a seed, for tests."""

from __future__ import annotations

import secrets
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from braidlora.federated.protocol.seeds import derive_seed

_AT_ONCE = 2**20  # values


class Entropy(Protocol):
    """A source of uniform random numbers."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` independent numbers in (0, 1)."""


class SystemEntropy:
    """The operating system's generator for cryptography, whose output no seed determines."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """52 bits each, so that all are exact and none is 0 or 1."""
        bits = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64) >> np.uint64(12)
        uniform: NDArray[np.float64] = (bits.astype(np.float64) + 0.5) * 2.0**-52
        return uniform


class SeededEntropy:
    """The same numbers every time. Whoever knows the seed knows the noise."""

    def __init__(self, *parts: str | int) -> None:
        self._random = np.random.default_rng(derive_seed("privacy", *parts))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """From the seed's generator, on the same grid."""
        uniform: NDArray[np.float64] = (np.floor(self._random.random(count) * 2.0**52) + 0.5) * 2.0**-52
        return uniform


def entropy(seed: int | None, *parts: str | int) -> Entropy:
    """The operating system's, or if there is a seed, that of the seed and `parts`."""
    return SystemEntropy() if seed is None else SeededEntropy(seed, *parts)


def normal(source: Entropy, count: int) -> NDArray[np.float64]:
    """Standard normal numbers in float64, by the inverse of the distribution function; at most ±8.2."""
    values = np.empty(count)
    for start in range(0, count, _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        ndtri(source.uniform(len(part)), out=part)
    return values


def poisson_sample(source: Entropy, names: list[str], rate: float) -> list[str]:
    """Each name with probability `rate`, independently of the others; possibly none."""
    if rate >= 1.0:
        return names
    return [name for name, u in zip(names, source.uniform(len(names)), strict=True) if u < rate]
