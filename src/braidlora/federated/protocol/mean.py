"""The weighted mean of tensors that arrive one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Aggregator(Protocol):
    """How same-shaped tensors of many clients become one set: the mean, or something that withstands lies.

    Attributes:
        measures_change: whether what the clients started from makes a difference.
    """

    measures_change: bool

    def start(self, reference: Mapping[str, Tensor]) -> None:
        """Begin a round. `reference` is what the clients started from; a name that is not in it stands for zero."""

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Take one client's tensors, which the caller may overwrite afterwards."""

    def finish(self) -> dict[str, Tensor]:
        """The aggregate, in float32 or better."""


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64 tensors: 16-bit uploads are never summed in 16 bits."""
    return torch.promote_types(tensor.dtype, torch.float32)


def owned(tensor: Tensor) -> Tensor:
    """A copy that is contiguous, as safetensors asks."""
    return tensor.clone(memory_format=torch.contiguous_format)


def moved(mean: Tensor, value: Tensor, share: float) -> Tensor:
    """mean + share · (value − mean); written over `mean`, unless `value` has more digits."""
    dtype = torch.promote_types(mean.dtype, value.dtype)
    return mean.to(dtype).lerp_(value.to(dtype), share)


class WeightedMean:
    """Σ wᵢ tᵢ / Σ wᵢ, with one accumulator whatever the number of clients.

    The running mean moves towards each newcomer by its share, m ← m + (w / Σw)(t − m), rather than summing first: one
    client's tensors, or equal tensors of all, come out as they went in, to the bit.
    """

    measures_change = False

    def start(self, reference: Mapping[str, Tensor]) -> None:
        self._mean: dict[str, Tensor] = {}
        self._weight = 0.0

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        self._weight += weight
        share = weight / self._weight
        for name, tensor in tensors.items():
            value = tensor.detach().to(accumulation_dtype(tensor))
            mean = self._mean.get(name)
            self._mean[name] = owned(value) if mean is None else moved(mean, value, share)

    def finish(self) -> dict[str, Tensor]:
        mean, self._mean, self._weight = self._mean, {}, 0.0
        return mean
