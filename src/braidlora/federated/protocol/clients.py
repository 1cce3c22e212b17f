"""A client, as the server and as its own site know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClientSpec:
    """A client as the server knows it.

    Args:
        name: stable; files are named after it, and seeds follow from it.
        rank: r_i.
        scaling: s_i.
    """

    name: str
    rank: int
    scaling: float


@dataclass(frozen=True)
class TrainingClient(ClientSpec):
    """A client at its own site.

    Args:
        seed: source of all its random numbers.
    """

    seed: int
