"""How alike tasks are, from one plain LoRA per task: pure functions on tensors, all sums in float64.

Every LoRA starts from the same A. Suffixes: T tasks, r rank, k and d the width of the input and of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from braidlora.analysis import subspaces

Matrix = list[list[float | None]]


def update_products(A_Trk: Tensor, B_Tdr: Tensor) -> Tensor:
    """Inner products ⟨B_t A_t, B_u A_u⟩ of one layer's updates, (T, T); those of several layers add up.

    The updates (d, k) are never formed: ⟨B_t A_t, B_u A_u⟩ = Σ (B_tᵀ B_u) ∘ (A_t A_uᵀ).
    """
    A, B = A_Trk.double(), B_Tdr.double()
    outer = torch.einsum("tdr,uds->turs", B, B)
    inner = torch.einsum("trk,usk->turs", A, A)
    return (outer * inner).sum((2, 3))


def cosines(products: Tensor) -> Tensor:
    """Cosines (T, T) from inner products; NaN where a vector is zero."""
    norms = products.diagonal().sqrt()
    return products / torch.outer(norms, norms)


def column_similarity(B: Sequence[Tensor]) -> tuple[Tensor, float] | None:
    """Subspace similarity of the column spaces of one layer's B's, (T, T), and its chance level r / d.

    Returns:
        None if a B does not have full rank, as after too few steps.
    """
    spaces = [subspaces.column_space(one) for one in B]
    if any(space.basis is None for space in spaces):
        return None
    found = torch.ones(len(B), len(B), dtype=torch.float64)
    for t, one in enumerate(spaces):
        for u, other in enumerate(spaces[:t]):
            found[t, u] = found[u, t] = subspaces.similarity(one, other)
    return found, subspaces.chance(spaces[0], spaces[0])


def second_moment(z_BLr: Tensor, mask_BL: Tensor) -> Tensor:
    """Σ z zᵀ over the tokens that are no padding, (r, r): of A x, what a layer's A reads from a task's rows."""
    z = z_BLr[mask_BL.bool()].double()
    return z.T @ z


def moment_cosines(first_Trr: Tensor, second_Trr: Tensor) -> Tensor:
    """Cosines of second moments, (T, T): 1 if two tasks' A x fill the same directions in the same proportions.

    The diagonal has the cosine between both halves of one task's rows, the most that two tasks can be expected to have.
    """
    whole = (first_Trr + second_Trr).flatten(1)
    found = cosines(whole @ whole.T)
    first, second = first_Trr.flatten(1), second_Trr.flatten(1)
    own = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
    found.diagonal().copy_(own)
    return found


def as_matrix(values: Tensor) -> Matrix:
    """A JSON value, None where a number is not finite."""
    finite = values.isfinite().tolist()
    return [
        [value if known else None for value, known in zip(row, there, strict=True)]
        for row, there in zip(values.tolist(), finite, strict=True)
    ]
