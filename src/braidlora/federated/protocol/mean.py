"""The weighted mean of tensors that arrive one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Aggregator(Protocol):
    """Combines same-shaped tensors of many clients: the mean, or an aggregator that tolerates malicious clients.

    Attributes:
        measures_change: whether the result depends on what the clients started from.
    """

    measures_change: bool

    def start(self, reference: Mapping[str, Tensor]) -> None:
        """Begin a round. `reference` is what the clients started from; names missing in it started at zero."""

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's tensors, which the caller may overwrite afterward."""

    def finish(self) -> dict[str, Tensor]:
        """The aggregate, in float32 or better."""


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64 tensors: 16-bit updates are never summed in 16 bits."""
    return torch.promote_types(tensor.dtype, torch.float32)


def owned(tensor: Tensor) -> Tensor:
    """A contiguous copy, as safetensors requires."""
    return tensor.clone(memory_format=torch.contiguous_format)


def moved(mean: Tensor, value: Tensor, share: float) -> Tensor:
    """mean + share · (value − mean); written over `mean`, unless `value` has the wider dtype."""
    dtype = torch.promote_types(mean.dtype, value.dtype)
    return mean.to(dtype).lerp_(value.to(dtype), share)


class WeightedMean:
    """Σ wᵢ tᵢ / Σ wᵢ, with one accumulator for any number of clients.

    The running mean moves toward each new client by its share, m ← m + (w / Σw)(t − m), instead of summing first, so
    that the tensors of a single client, or equal tensors of all, keep every bit.
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
