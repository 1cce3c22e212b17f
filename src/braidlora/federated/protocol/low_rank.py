"""Sums of low-rank products, exactly: stacked factors, and their singular value decomposition.

Suffixes: D out_features, K in_features, R the sum of the ranks so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braidlora.federated.protocol.mean import accumulation_dtype


class ProductSum:
    """W (d, k) = Σ wᵢ Bᵢ Aᵢ, kept as the stacks [wᵢ Bᵢ] (d, R) and [Aᵢ] (R, k).

    Once R exceeds `dense_above` · min(d, k) a dense W replaces the stacks, and memory stops growing.
    """

    def __init__(self, dense_above: float) -> None:
        self._dense_above = dense_above
        self._B: list[Tensor] = []
        self._A: list[Tensor] = []
        self._dense: Tensor | None = None
        self.rank = 0

    @torch.no_grad()
    def add(self, B: Tensor, A: Tensor, weight: float) -> None:
        """Add weight · B (d, r) A (r, k). The tensors are copied."""
        dtype = torch.promote_types(accumulation_dtype(A), accumulation_dtype(B))
        B, A = B.detach().to(dtype) * weight, A.detach().to(dtype, copy=True)
        self.rank += A.shape[0]
        if self._dense is not None:
            dtype = torch.promote_types(self._dense.dtype, dtype)
            self._dense = self._dense.to(dtype).addmm_(B.to(dtype), A.to(dtype))
            return
        self._B.append(B)
        self._A.append(A)
        if self.rank > self._dense_above * min(B.shape[0], A.shape[1]):
            B, A = self._stacks()
            self._dense = B @ A
            self._B, self._A = [], []

    def factors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(B (d, R), A (R, k)) with B A = scale · W; R is at most min(d, k) once W is dense."""
        if self._dense is None:
            B, A = self._stacks()
            return B.mul_(scale), A
        D, K = self._dense.shape
        scaled = self._dense * scale
        if K <= D:
            return scaled, torch.eye(K).to(scaled)
        return torch.eye(D).to(scaled), scaled

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (d, n), S (n,) descending, Vᵀ (n, k) with U S Vᵀ = W and n = min(R, d, k).

        W is never formed from the stacks: with B = Q_B R_B and Aᵀ = Q_A R_A only R_B R_Aᵀ (R, R) is decomposed.
        """
        if self._dense is not None:
            return torch.linalg.svd(self._dense, full_matrices=False)
        B, A = self._stacks()
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.mT)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        return Q_B @ U, S, Vh @ Q_A.mT

    def _stacks(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._B, 1), torch.cat(self._A, 0)


def with_orthonormal_rows(V: Tensor, rows: int) -> Tensor:
    """V (n, k) of orthonormal rows, extended to `rows` orthonormal rows; beyond k rows with zeros.

    The added rows are a function of V. They give a client of a higher rank than the aggregate's directions to train in:
    with zero rows in A and zero columns in B neither would ever get a gradient.
    """
    n, k = V.shape
    if rows <= n:
        return V[:rows]
    extra = max(0, min(rows, k) - n)
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(k, extra, generator=generator, dtype=torch.float64).to(V)
    for _ in range(2):  # the second pass removes what rounding left of V in the first
        fresh = torch.linalg.qr(fresh - V.mT @ (V @ fresh)).Q
    padding = V.new_zeros(rows - n - extra, k)
    return torch.cat([V, fresh.mT, padding])
