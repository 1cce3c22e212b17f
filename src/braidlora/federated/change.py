"""What a round changes, as something to measure: a client's update against what the client was sent.

A change is a tensor, or a product B A that is never formed, for every name. Its norm is that of all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(NamedTuple):
    """B (d, r) times A (r, k)."""

    B: Tensor
    A: Tensor


Change = Mapping[str, Tensor | Product]


def inner(one: Change, other: Change) -> float:
    """⟨one, other⟩ over the names that both have. A tensor of fewer rows or columns counts as padded with zeros."""
    return math.fsum(_inner(value, other[name]) for name, value in one.items() if name in other)


def norm(change: Change) -> float:
    """Frobenius norm of all tensors together."""
    return math.sqrt(max(0.0, inner(change, change)))


def cosine(one: Change, other: Change, norms: tuple[float, float] | None = None) -> float | None:
    """The cosine of the angle between two changes, whose norms may be known; None where either is zero."""
    first, second = norms or (norm(one), norm(other))
    return None if 0.0 in (first, second) else max(-1.0, min(1.0, inner(one, other) / first / second))


def entries(change: Change) -> int:
    """How many numbers a change has, a product's all counted."""
    return sum(
        value.B.shape[0] * value.A.shape[1] if isinstance(value, Product) else value.numel()
        for value in change.values()
    )


def difference(after: Tensor, before: Tensor | None) -> Tensor:
    """after − before, the latter padded with zeros or cut to the former's size; `after` where there is no before."""
    if before is None:
        return after
    if before.shape != after.shape:
        padding = [n for a, b in zip(after.shape, before.shape, strict=True) for n in (a - b, 0)]
        before = F.pad(before, padding[::-1])  # negative: cut
    dtype = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    return after.to(dtype) - before.to(dtype)


@torch.no_grad()
def _inner(one: Tensor | Product, other: Tensor | Product) -> float:
    if isinstance(one, Product) and isinstance(other, Product):
        return _in_digits_that_do(_of_products, *one, *other)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    if one.shape != other.shape:
        common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
        one, other = one[common], other[common]
    return _in_digits_that_do(torch.dot, one.flatten(), other.flatten())


def _of_products(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
    """⟨B1 A1, B2 A2⟩ = tr((B1ᵀ B2)(A2 A1ᵀ)), by matrices of the ranks' size."""
    return ((B1.mT @ B2).double() * (A1 @ A2.mT).double()).sum()


def _in_digits_that_do(product: Callable[..., Tensor], *tensors: Tensor) -> float:
    """In float32, or better where a tensor is, or where float32 cannot hold the squares."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    value = float(product(*(tensor.detach().to(dtype) for tensor in tensors)))
    if math.isfinite(value):
        return value
    return float(product(*(tensor.detach().double() for tensor in tensors)))
