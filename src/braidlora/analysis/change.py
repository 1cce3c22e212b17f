"""How far a matrix moved, by column, in magnitude and in direction: the decomposition of DoRA (arXiv 2402.09353).

    magnitude = Σⱼ |‖yⱼ‖ − ‖xⱼ‖| / Σⱼ ‖xⱼ‖        direction = meanⱼ (1 − cos(xⱼ, yⱼ))

for columns xⱼ before and yⱼ after. The columns of an update ΔW = s·B A are never formed: with aⱼ the j-th column of A,
‖s·B aⱼ‖² = s² aⱼᵀ (BᵀB) aⱼ, and the inner product of two updates needs only the r × r matrix B₁ᵀB₂.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """The change from one matrix to another.

    Attributes:
        norm_before, norm_after: Frobenius norms.
        magnitude: change of the columns' norms, relative to the norms before; None if all are zero.
        direction: mean of 1 − cosine over the columns, in [0, 2]; None if no column is nonzero in both.
    """

    norm_before: float
    norm_after: float
    magnitude: float | None
    direction: float | None


def matrix_change(X: Tensor, Y: Tensor) -> Change:
    """The change from X to Y, two matrices of one shape, over their columns."""
    X, Y = X.double(), Y.double()
    return _change(X.square().sum(0), Y.square().sum(0), (X * Y).sum(0))


def update_change(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], scaling: float) -> Change:
    """The change of ΔW = s·B A over its k columns, from the factors A (r, k) and B (d, r)."""
    (A0, B0), (A1, B1) = ((A.double(), B.double() * scaling) for A, B in (before, after))
    return _change(_inner(A0, B0, A0, B0), _inner(A1, B1, A1, B1), _inner(A0, B0, A1, B1))


def _inner(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Inner products of the columns of B A with those of D C: (k,)."""
    return (A * ((B.T @ D) @ C)).sum(0)


def _change(xx: Tensor, yy: Tensor, xy: Tensor) -> Change:
    """From the columns' squared norms before and after, and their inner products."""
    before, after = xx.clamp(min=0.0).sqrt(), yy.clamp(min=0.0).sqrt()
    both = (before > 0) & (after > 0)
    magnitude = float((after - before).abs().sum() / before.sum()) if bool(before.any()) else None
    cosine = (xy[both] / (before[both] * after[both])).clamp(-1.0, 1.0)
    return Change(
        norm_before=float(torch.linalg.vector_norm(before)),
        norm_after=float(torch.linalg.vector_norm(after)),
        magnitude=magnitude,
        direction=float((1.0 - cosine).mean()) if bool(both.any()) else None,
    )
