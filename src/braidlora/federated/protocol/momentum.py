"""FedAvgM: the server continues its last steps (Hsu et al., arXiv 1909.06335)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from braidlora.federated.protocol.factors import split
from braidlora.federated.protocol.mean import accumulation_dtype, owned


@torch.no_grad()
def advanced(
    before: Mapping[str, Tensor],
    aggregate: Mapping[str, Tensor],
    velocity: Mapping[str, Tensor],
    *,
    momentum: float,
    learning_rate: float,
    settled: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The shared state after v ← β v + (θ − θ̄) and θ ← θ − η v, and the new v, tensor by tensor.

    Args:
        before: θ, what clients started the round from. A tensor that is missing in it, because clients had no common
            start, or that had another shape, becomes θ̄.
        aggregate: θ̄, what the rule made of the clients' updates.
        velocity: v by name; zero where it is missing.
        momentum: β.
        learning_rate: η. With β = 0 and η = 1 the result is θ̄.
        settled: factors that this round does not aggregate; they and their v do not change.
    """
    shared, moving = dict(aggregate), dict(velocity)
    for name, mean in aggregate.items():
        start = before.get(name)
        if split(name)[1] in settled or start is None or start.shape != mean.shape:
            continue
        dtype = torch.promote_types(accumulation_dtype(start), mean.dtype)
        step = start.to(dtype) - mean.to(dtype)
        if (last := velocity.get(name)) is not None:
            step += momentum * last.to(dtype)
        moving[name] = owned(step)
        shared[name] = start.to(dtype) - learning_rate * step
    return shared, moving
