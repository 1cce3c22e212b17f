"""What a round changes, for measuring: a client's update minus what the client was sent.

A change has a tensor, or a product B A that is never formed, under every name. Its norm is over all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(NamedTuple):
    """B (d, r) times A (r, k)."""

    B: Tensor
    A: Tensor


Value = Tensor | Product
Change = Iterable[tuple[str, Value]]  # read once, so that it need not be in memory at one time


class Extent(NamedTuple):
    """The norm of a change and its number of entries; a product counts with all entries of B A."""

    norm: float
    entries: int

    @property
    def size(self) -> float:
        """Root mean square of the entries; 0 without any."""
        return self.norm / math.sqrt(self.entries) if self.entries else 0.0


@torch.no_grad()
def extent(change: Change) -> Extent:
    """The Frobenius norm of all tensors together, and their number of entries."""
    squares, entries = [], 0
    for _, value in change:
        squares.append(inner(value, value))
        entries += value.B.shape[0] * value.A.shape[1] if isinstance(value, Product) else value.numel()
    return Extent(math.sqrt(max(0.0, math.fsum(squares))), entries)


@torch.no_grad()
def cosine(change: Change, norm: float, other: Mapping[str, Value], other_norm: float) -> float | None:
    """The cosine of the angle between two changes of these norms; None where either is zero."""
    if 0.0 in (norm, other_norm):
        return None
    product = math.fsum(inner(value, other[name]) for name, value in change if name in other)
    return max(-1.0, min(1.0, product / norm / other_norm))


def difference(after: Tensor, before: Tensor | None) -> Tensor:
    """after − before, with `before` zero-padded or cut to the size of `after`; `after` where there is no `before`."""
    if before is None:
        return after
    if before.shape != after.shape:
        padding = [n for a, b in zip(after.shape, before.shape, strict=True) for n in (a - b, 0)]
        before = F.pad(before, padding[::-1])  # negative: cut
    if after.dtype == before.dtype == torch.float32:
        return after - before
    dtype = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    return after.to(dtype) - before.to(dtype)


def inner(one: Value, other: Value) -> float:
    """⟨one, other⟩ of two tensors or two products. A tensor of fewer rows or columns counts as zero-padded."""
    if isinstance(one, Product) and isinstance(other, Product):
        return _in_enough_precision(_inner_of_products, *one, *other)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    if one.shape != other.shape:
        common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
        one, other = one[common], other[common]
    return _in_enough_precision(torch.dot, one.flatten(), other.flatten())


def _inner_of_products(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """⟨B1 A1, B2 A2⟩ = tr((B1ᵀ B2)(A2 A1ᵀ)), through matrices of the size of the ranks."""
    return ((B1.mT @ B2).double() * (A1 @ A2.mT).double()).sum()


def _in_enough_precision(product: Callable[..., Tensor], *tensors: Tensor) -> float:
    """In float32, or better where a tensor is in better, or where the result overflows float32."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == {torch.float32}:
        value = float(product(*tensors))
    else:
        dtype = torch.float32
        for one in dtypes:
            dtype = torch.promote_types(dtype, one)
        value = float(product(*(tensor.to(dtype) for tensor in tensors)))
    if math.isfinite(value):
        return value
    return float(product(*(tensor.double() for tensor in tensors)))
