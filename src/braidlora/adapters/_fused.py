"""The layer as two autograd functions that touch full-width tensors as rarely as they can.

Between the two stands the base layer, so that both gradients of x meet in `Shrink` and are added where they lie:

    x ──► Shrink ──► x ──► base layer ──► y0 ──► Expand ──► y
             └────────► z = [x Aᵀ | x W_gᵀ] ──────┘

Full-width passes of the adapter, forward and backward, whatever N is: Shrink reads x twice and updates the base
layer's dx; Expand updates y0 and reads dy twice. Saved beyond x is z, and nothing else that has T rows: the gate
weights and the mix are computed again in backward. Copies of weights are kept where they had to be cast.

Suffixes: T tokens, K in_features, D out_features, N experts, G rows of the stacked A, U columns of the stacked B,
P ≥ G + N columns of z.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from braidlora.adapters.functional import (
    Share,
    balance_gradient,
    gate_weights,
    mix,
    mix_backward,
    stacked_ranks,
)


class Gate(NamedTuple):
    """What happens between the stacked A and the stacked B; `balance` is 0 outside training."""

    share: Share
    num_experts: int
    r: int
    temperature: float
    balance: float


class Shrink(torch.autograd.Function):
    """z (T, P) = [drop(x) Aᵀ | x W_gᵀ | padding], and x (…, K) handed on, so that its two gradients meet here.

    Called with (x, A (G, K), W_g (N, K) or None, dropout, padding, fork, in_place). With `fork` the result is
    (z, x), else z alone. `in_place` allows to add to the gradient that arrives for the x handed on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A_GK: Tensor,
        W_NK: Tensor | None,
        dropout: float,
        padding: int,
        fork: bool,
        in_place: bool,
    ) -> Any:
        x_TK = x.reshape(-1, x.shape[-1])
        G = A_GK.shape[0]
        stack_PK = _stack(A_GK, W_NK, padding, x)
        if dropout == 0.0:
            mask_TK = None
            z_TP = x_TK @ stack_PK.t()
        else:
            dropped_TK, mask_TK = torch.native_dropout(x_TK, dropout, True)
            z_TP = x_TK.new_empty(x_TK.shape[0], stack_PK.shape[0])
            torch.mm(dropped_TK, stack_PK[:G].t(), out=z_TP[:, :G])
            if W_NK is not None:
                torch.mm(x_TK, stack_PK[G:].t(), out=z_TP[:, G:])
        copy_PK = stack_PK if A_GK.dtype != x.dtype else None
        ctx.save_for_backward(x_TK, mask_TK, A_GK, W_NK, copy_PK)
        ctx.x_shape, ctx.dropout, ctx.padding, ctx.in_place = x.shape, dropout, padding, in_place
        # A detached alias: autograd gives it this function as its history, and does not take it for a view.
        return (z_TP, x.detach()) if fork else z_TP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TP: Tensor, dx: Tensor | None = None) -> Any:
        x_TK, mask_TK, A_GK, W_NK, stack_PK = ctx.saved_tensors
        if stack_PK is None:
            stack_PK = _stack(A_GK, W_NK, ctx.padding, x_TK)
        G, N = A_GK.shape[0], 0 if W_NK is None else W_NK.shape[0]
        need_x, need_A, need_W = ctx.needs_input_grad[:3]
        dA_GK: Any = None
        dW_NK: Any = None
        dx_TK: Any = None if dx is None else dx.reshape(-1, x_TK.shape[-1])
        if mask_TK is None:
            if need_A or need_W:
                dstack_PK = (dz_TP.t() @ x_TK).to(A_GK.dtype)
                dA_GK, dW_NK = dstack_PK[:G], dstack_PK[G : G + N]
            if need_x:
                dx_TK = _add_product(dx_TK, dz_TP, stack_PK, ctx.in_place)
        else:
            scale = 1.0 / (1.0 - ctx.dropout)
            # The dropped x is made again from the mask (a byte an element) rather than kept.
            buffer_TK = torch.ops.aten.native_dropout_backward(x_TK, mask_TK, scale)
            dA_GK = dz_TP[:, :G].t() @ buffer_TK
            if N:
                dW_NK = dz_TP[:, G : G + N].t() @ x_TK
            if need_x:
                torch.mm(dz_TP[:, :G], stack_PK[:G], out=buffer_TK)
                dx_TK = _add_masked(dx_TK, buffer_TK, mask_TK, scale, ctx.in_place)
                if N:
                    dx_TK.addmm_(dz_TP[:, G:], stack_PK[G:])
        return (
            dx_TK.view(ctx.x_shape) if need_x else None,
            dA_GK.to(A_GK.dtype) if need_A else None,
            dW_NK.to(W_NK.dtype) if need_W else None,
            None, None, None, None,
        )  # fmt: skip


class Expand(torch.autograd.Function):
    """y (…, D) = y0 + s·u Bᵀ with u (T, U) the gated z.

    Called with (y0 (…, D), z (T, P), B (D, U), scaling, gate, in_place). With `in_place` y is written over y0:
    only for a y0 that nothing else reads.
    """

    @staticmethod
    def forward(
        ctx: Any, y0: Tensor, z_TP: Tensor, B_DU: Tensor, scaling: float, gate: Gate, in_place: bool
    ) -> Tensor:
        B_UD = _transposed(B_DU, z_TP)
        u_TU = _gated(z_TP, gate)
        ctx.save_for_backward(z_TP, B_DU, B_UD if B_DU.dtype != z_TP.dtype else None)
        ctx.scaling, ctx.gate = scaling, gate
        y_TD = y0.detach().reshape(-1, y0.shape[-1])
        if y_TD.dtype != z_TP.dtype:
            y_TD = y_TD + (u_TU @ B_UD).mul_(scaling).to(y_TD.dtype)
        elif in_place:
            y_TD.addmm_(u_TU, B_UD, alpha=scaling)
        else:
            y_TD = torch.addmm(y_TD, u_TU, B_UD, alpha=scaling)
        return y_TD.view(y0.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        z_TP, B_DU, B_UD = ctx.saved_tensors
        B_UD = _transposed(B_DU, z_TP) if B_UD is None else B_UD
        dy_TD = dy.reshape(-1, dy.shape[-1]).to(z_TP.dtype)
        dz_TP, su_TU = _gated_backward(dy_TD @ B_UD.t(), z_TP, ctx.scaling, ctx.gate)
        dB_DU = None
        if ctx.needs_input_grad[2]:
            dB_DU = dy_TD.t() @ su_TU if dy.is_cuda else (su_TU.t() @ dy_TD).t()  # see _transposed
            dB_DU = dB_DU.to(B_DU.dtype)
        return dy, dz_TP, dB_DU, None, None, None


def padding_for(gate: Gate, rows_A: int) -> int:
    """Columns that bring z to a multiple of 8, where matrix products are fastest.

    They are left out where they would weigh more than the mix and the gate weights that are not saved.
    """
    padding = -(rows_A + gate.num_experts) % 8
    return padding if gate.num_experts > 1 and padding <= min(rows_A, gate.num_experts + gate.r) else 0


def _stack(A_GK: Tensor, W_NK: Tensor | None, padding: int, like: Tensor) -> Tensor:
    """[A; W_g; padding] (P, K) in the dtype of x: the weights are cast, never x.

    Padding repeats rows of A, which takes no launch of its own; their columns of z are never read, and their part of
    dz is zero.
    """
    stack = A_GK if W_NK is None else torch.cat([A_GK, W_NK.to(A_GK.dtype), A_GK[:padding]])
    return stack.to(like.dtype)


def _transposed(B_DU: Tensor, like: Tensor) -> Tensor:
    """Bᵀ (U, D) in the dtype of z.

    On a CPU with one rank per row in memory: there, products with a few columns are several times faster from that
    layout, and so is the gradient of B computed as Bᵀ's. On CUDA both are one.
    """
    if like.is_cuda:
        return B_DU.to(like.dtype).t()
    return B_DU.t().to(like.dtype, memory_format=torch.contiguous_format)


def _gated(z_TP: Tensor, gate: Gate) -> Tensor:
    """u (T, U), in the dtype of z."""
    if gate.num_experts == 1:
        return z_TP
    if kernels := _kernels(z_TP, gate):
        return kernels.gate_forward(z_TP, gate.share, gate.num_experts, gate.r, gate.temperature)
    h_TG, w_TN = _split(z_TP, gate)
    return mix(h_TG, w_TN, gate.share).to(z_TP.dtype)


def _gated_backward(du_TU: Tensor, z_TP: Tensor, scaling: float, gate: Gate) -> tuple[Tensor, Tensor]:
    """(dz (T, P), s·u (T, U)) from the gradient of s·u (T, U)."""
    if gate.num_experts == 1:
        return du_TU.mul_(scaling), z_TP * scaling
    if kernels := _kernels(z_TP, gate):
        return kernels.gate_backward(
            du_TU, z_TP, gate.share, gate.num_experts, gate.r, gate.temperature, scaling
        )
    h_TG, w_TN = _split(z_TP, gate)
    su_TU = mix(h_TG, w_TN, gate.share).mul_(scaling).to(z_TP.dtype)
    dh_TG, dw_TN = mix_backward(du_TU.to(w_TN.dtype) * scaling, h_TG, w_TN, gate.share)
    if gate.balance:
        dw_TN = dw_TN + gate.balance * balance_gradient(w_TN)
    wdw_TN = w_TN * dw_TN
    dlogits_TN = torch.addcmul(wdw_TN, w_TN, wdw_TN.sum(-1, keepdim=True), value=-1.0)
    if gate.temperature != 1.0:
        dlogits_TN /= gate.temperature
    G, N = h_TG.shape[1], gate.num_experts
    dz_TP = torch.empty_like(z_TP)
    dz_TP[:, :G] = dh_TG
    dz_TP[:, G : G + N] = dlogits_TN
    if z_TP.shape[1] > G + N:
        dz_TP[:, G + N :] = 0.0
    return dz_TP, su_TU


def _split(z_TP: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """h (T, G) and the gate weights (T, N) out of z."""
    G, _ = stacked_ranks(gate.share, gate.num_experts, gate.r)
    return z_TP[:, :G], gate_weights(z_TP[:, G : G + gate.num_experts], gate.temperature)


def _kernels(z_TP: Tensor, gate: Gate) -> ModuleType | None:
    """The CUDA kernels of the gate, where they apply. The balance loss needs a mean over all tokens, and float64 more
    digits than they have."""
    if z_TP.is_cuda and not gate.balance and z_TP.dtype != torch.float64:
        return _triton_gate()
    return None


@functools.cache
def _triton_gate() -> ModuleType | None:
    # Triton comes with torch for CUDA on Linux; without it the same is computed in plain operations.
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("braidlora.adapters._triton_gate")


def _add_product(sum_TK: Tensor | None, left: Tensor, right: Tensor, in_place: bool) -> Tensor:
    if sum_TK is None:
        return left @ right
    return sum_TK.addmm_(left, right) if in_place else torch.addmm(sum_TK, left, right)


def _add_masked(sum_TK: Tensor | None, d_TK: Tensor, mask_TK: Tensor, scale: float, in_place: bool) -> Tensor:
    if sum_TK is None:
        return torch.ops.aten.native_dropout_backward(d_TK, mask_TK, scale)
    if in_place:
        return sum_TK.addcmul_(d_TK, mask_TK, value=scale)
    return torch.addcmul(sum_TK, d_TK, mask_TK, value=scale)
