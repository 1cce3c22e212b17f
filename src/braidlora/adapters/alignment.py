"""The alignment loss: how far apart the tasks' A x are, as a term of the training objective (Align-LoRA).

For every adapted layer and pair of tasks (t, u) the distributions of Z = A x over the rows of t and of u are compared
position by position, and the mean over layers, pairs and positions is the loss. Rows are grouped by their own task, and
padding counts nowhere: a position counts for a pair only if both tasks have enough rows there.

    kl   ½ (KL(p‖q) + KL(q‖p)) of diagonal Gaussians over the rows, summed over the components; two rows a task
    mmd  MMD² with a sum of 19 Gaussian kernels exp(−d² / 2σ), σ from 1e-6 to 1e6 (arXiv 1502.02791, 1608.06019)

Suffixes: B rows, L positions, G components of A x, T tasks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["mmd", "kl"]
MEASURES: tuple[Measure, ...] = ("mmd", "kl")
_WIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
_LEAST_VARIANCE = 1e-4  # two rows may agree in a component, and a variance of zero has no KL

_context = threading.local()


@contextmanager
def collecting() -> Iterator[list[Tensor]]:
    """Collect A x of every layer that a model in training mode calls here: a list of (B, L, G), with their graph.

    What a gradient checkpoint runs again in backward is not collected again.
    """
    before, _context.collected = collected(), []
    try:
        yield _context.collected
    finally:
        _context.collected = before


def collected() -> list[Tensor] | None:
    """The list of the present context; None outside of one."""
    return getattr(_context, "collected", None)


def alignment_loss(
    parts: Sequence[Tensor], tasks: Tensor, mask: Tensor, measure: Measure = "mmd"
) -> Tensor | None:
    """The mean over layers, pairs of tasks and positions; None if no pair has enough rows anywhere.

    Args:
        parts: A x of each layer, (B, L, G); of another shape are layers that do not see rows of tokens, and are left
            out.
        tasks: (B,), the number of each row's task.
        mask: (B, L), true for tokens that are no padding.
    """
    shape = tuple(mask.shape)
    of_rows = [part for part in parts if part.dim() == 3 and tuple(part.shape[:2]) == shape]
    if not of_rows:
        return None
    present = tasks.unique()
    own_BLT = mask.bool()[..., None] & (tasks[:, None, None] == present)
    count_LT = own_BLT.sum(0)
    enough_LT = count_LT >= (2 if measure == "kl" else 1)
    pairs_LTT = (enough_LT[:, :, None] & enough_LT[:, None, :]).triu(1)
    if not bool(pairs_LTT.any()):
        return None
    distance = _kl if measure == "kl" else _mmd
    losses = []
    for part in of_rows:
        z_BLG = part.to(torch.promote_types(part.dtype, torch.float32))
        share_BLT = own_BLT.to(z_BLG.dtype) / count_LT.clamp(min=1)
        losses.append(distance(z_BLG, share_BLT)[pairs_LTT].mean())
    return torch.stack(losses).mean()


def _mmd(z_BLG: Tensor, share_BLT: Tensor) -> Tensor:
    """MMD² (L, T, T): (a_t − a_u)ᵀ K (a_t − a_u), with a_t the shares of the rows of t and K the kernel of all rows."""
    z_LBG, a_LBT = z_BLG.transpose(0, 1), share_BLT.transpose(0, 1)
    square_LBB = (z_LBG[:, :, None] - z_LBG[:, None]).square().sum(-1)
    kernel_LBB = torch.stack([torch.exp(-square_LBB / (2.0 * width)) for width in _WIDTHS]).sum(0)
    mean_LTT = a_LBT.mT @ kernel_LBB @ a_LBT
    own_LT = mean_LTT.diagonal(dim1=1, dim2=2)
    return (own_LT[:, :, None] + own_LT[:, None] - 2.0 * mean_LTT).clamp(min=0.0)


def _kl(z_BLG: Tensor, share_BLT: Tensor) -> Tensor:
    """½ (KL(t‖u) + KL(u‖t)) (L, T, T), summed over the components."""
    mean_LTG = torch.einsum("blt,blg->ltg", share_BLT, z_BLG)
    off_BLTG = z_BLG[:, :, None] - mean_LTG
    variance_LTG = torch.einsum("blt,bltg->ltg", share_BLT, off_BLTG.square()) + _LEAST_VARIANCE
    square_LTTG = (mean_LTG[:, :, None] - mean_LTG[:, None]).square()
    v, u = variance_LTG[:, :, None], variance_LTG[:, None]
    return 0.25 * ((v + square_LTTG) / u + (u + square_LTTG) / v - 2.0).sum(-1)
