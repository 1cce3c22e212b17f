"""What travels, counted before anything runs: parameters and bytes per client and round, up and down.

The numbers follow from the rule's declaration of what it sends (`Rule.upload_shapes`, `Rule.download_shapes`), which
the guard enforces, so what travels is what was planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean  # of integers it is an integer if it can be

import torch

from braidlora.federated.protocol.factors import AdaptedLayer, factor_shapes
from braidlora.federated.protocol.rules.rule import Rule
from braidlora.safetensors_size import serialized_bytes


@dataclass(frozen=True)
class Traffic:
    """One client's traffic in one round; of a rule that alternates, the mean over its turns.

    Args:
        rank: the client's rank.
        up_parameters, down_parameters: numbers sent and received.
        up_bytes, down_bytes: the same in bytes, as safetensors with header.
    """

    rank: int
    up_parameters: float
    down_parameters: float
    up_bytes: float
    down_bytes: float

    @property
    def parameters(self) -> float:
        """Up and down together."""
        return self.up_parameters + self.down_parameters


def traffic(
    rule: Rule,
    layers: Iterable[AdaptedLayer],
    ranks: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    down_dtype: torch.dtype | None = None,
    also: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Traffic]:
    """Traffic of each client, in the order of `ranks`, in a round in which all take part and after it.

    Args:
        layers: the adapted layers (`adapted_layers`).
        ranks: rank of every client.
        dtype: of what is sent up.
        down_dtype: of what is sent down; by default `dtype`.
        also: shapes of further tensors that travel both ways, such as a shared classification head.
    """
    layers, also = tuple(layers), dict(also or {})
    turns = range(1, len(rule.spec.turns) + 1) or (0,)
    by_rank = {}
    for rank in sorted(set(ranks)):
        ups = [rule.upload_shapes(layers, rank, turn) | also for turn in turns]
        downs = [rule.download_shapes(layers, rank, ranks, turn) | also for turn in turns]
        by_rank[rank] = Traffic(
            rank,
            mean(parameters(up) for up in ups),
            mean(parameters(down) for down in downs),
            mean(serialized_bytes(up, dtype) for up in ups),
            mean(serialized_bytes(down, down_dtype or dtype) for down in downs),
        )
    return [by_rank[rank] for rank in ranks]


def mean_parameters(
    layers: Iterable[AdaptedLayer], ranks: Sequence[int], factors: Iterable[str], *, r_intermediate: int = 16
) -> float:
    """Parameters of the given factors, averaged over clients, whether or not a rule sends them.

    The paper's table counts the heterogeneous rule in two ways, both with B_base (d, m) down: with B1, B2 and M up for
    Llama-2-7B, and with B2 alone up for Qwen2-7B (arXiv 2509.25414).
    """
    layers, factors = tuple(layers), tuple(factors)
    counts = [parameters(factor_shapes(layers, factors, rank, r_intermediate)) for rank in ranks]
    return math.fsum(counts) / len(counts)


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes.values())
