"""Subspaces of R^n: bases, principal angles, and similarity (arXiv 2509.25414, section 2).

    similarity(X, Y) = mean(σ²) = ‖Q_Xᵀ Q_Y‖²_F / r,   σ = svd(Q_Xᵀ Q_Y), the cosines of the principal angles

It is 1 for the same subspace, 0 for orthogonal ones, and does not depend on the basis. Two random r-dimensional
subspaces of R^n give r/n on average: the chance level. For unequal ranks, the divisor is the smaller one, and the
chance level is the larger one over n.

Shapes: n the dimension of the space, r the rank. Everything is float64, and no decomposition is larger than r × r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Subspace:
    """A subspace of R^n.

    Attributes:
        n: the dimension of the space.
        basis: (n, r) with orthonormal columns, or None if there is no subspace of the expected rank.
        reason: why there is none.
    """

    n: int
    basis: Tensor | None
    reason: str | None = None

    @property
    def rank(self) -> int:
        assert self.basis is not None
        return self.basis.shape[1]


def column_space(X_nr: Tensor, rank: int | None = None) -> Subspace:
    """The span of the columns of X (n, r).

    Args:
        X_nr: any floating-point dtype; its precision determines which singular values are rounding errors.
        rank: the expected rank of X, r by default. A product of narrower factors has less.

    Returns:
        the subspace of that rank; without a basis if X is zero or of a lower rank.
    """
    n = X_nr.shape[0]
    rank = min(X_nr.shape[1] if rank is None else rank, *X_nr.shape)
    Q, R = torch.linalg.qr(X_nr.double())
    U, S, _ = torch.linalg.svd(R)
    if S[0] == 0.0:
        return Subspace(n, None, "all zero")
    # The size of a singular value that should be 0, after rounding the entries of X or a sum of r products.
    rounding = torch.finfo(X_nr.dtype).eps * math.sqrt(X_nr.shape[1]) * float(S[0])
    found = int((rounding < S).sum())
    if found < rank:
        return Subspace(n, None, f"rank {found}, not {rank}")
    return Subspace(n, (Q @ U)[:, :rank])


def cosines(X: Subspace, Y: Subspace) -> Tensor:
    """Cosines of the principal angles of two subspaces of one space, descending: (min(r_X, r_Y),)."""
    assert X.basis is not None
    assert Y.basis is not None
    return torch.linalg.svdvals(X.basis.T @ Y.basis).clamp(max=1.0)


def similarity(X: Subspace, Y: Subspace) -> float:
    """mean(σ²) over the principal angles, in [0, 1]."""
    return float(cosines(X, Y).square().mean())


def angles(X: Subspace, Y: Subspace) -> list[float]:
    """Principal angles in degrees, ascending; below about 1e-6 degrees they are rounding errors."""
    return [float(angle) for angle in torch.rad2deg(torch.arccos(cosines(X, Y)))]


def chance(X: Subspace, Y: Subspace) -> float:
    """The similarity to expect of random subspaces of these ranks: max(r_X, r_Y) / n."""
    return max(X.rank, Y.rank) / X.n
