"""The layer as two autograd functions that read and write full-width tensors as rarely as possible.

The base layer runs between the two, so both gradients of x meet in `Shrink` and are added in place:

    x ──► Shrink ──► x ──► base layer ──► y0 ──► Expand ──► y
             └────────► z = [x Aᵀ | x W_gᵀ] ──────┘

Full-width passes of the adapter, forward and backward, whatever N is: Shrink reads x twice and updates the base
layer's dx; Expand updates y0 and reads dy twice. Besides x only z is saved, and nothing else with T rows: the gate
weights and the mix are recomputed in backward. Copies of weights are kept where they had to be cast.

Suffixes: T tokens, K in_features, D out_features, N experts, G rows of the stacked A, U columns of the stacked B,
P ≥ G + N columns of z.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.adapters._balance import Attachment
from braidlora.adapters._gate import Gate, gated, gated_backward
from braidlora.adapters._torch_state import (
    fresh_in_backward,
    is_alone,
    is_autocasting,
    is_batched,
    is_observed,
    is_transformed,
)

# x Wᵀ, as one call. As it was at import: what a later patch of torch.nn.functional returns may be held by others.
_product_with_transposed = F.linear


class Shrink(torch.autograd.Function):
    """z (T, P) = [drop(x) Aᵀ | x W_gᵀ | padding], and x (…, K) passed through, so that its two gradients meet here.

    Called with (x, A (G, K), W_g (N, K) or None, dropout, padding, fork, in_place). With `fork` the result is
    (z, x), else z alone. `in_place` lets backward add to the gradient of the x passed through, if nobody else
    holds it.
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
        x_TK = _as_rows(x)
        G = A_GK.shape[0]
        stack_PK = stack(A_GK, W_NK, padding, x)
        if dropout == 0.0:
            mask_TK = None
            z_TP = _product_with_transposed(x_TK, stack_PK)
        elif is_observed():  # a selective checkpoint may return the cached `out=` tensor without writing it
            dropped_TK, mask_TK = torch.native_dropout(x_TK, dropout, True)
            z_TP = dropped_TK @ stack_PK[:G].t()
            if W_NK is not None:
                z_TP = torch.cat([z_TP, x_TK @ stack_PK[G:].t()], 1)
        else:
            dropped_TK, mask_TK = torch.native_dropout(x_TK, dropout, True)
            z_TP = x_TK.new_empty(x_TK.shape[0], stack_PK.shape[0])
            torch.mm(dropped_TK, stack_PK[:G].t(), out=z_TP[:, :G])
            if W_NK is not None:
                torch.mm(x_TK, stack_PK[G:].t(), out=z_TP[:, G:])
        copy_PK = stack_PK if A_GK.dtype != x.dtype else None
        ctx.save_for_backward(x, mask_TK, A_GK, W_NK, copy_PK)
        ctx.dropout, ctx.padding, ctx.in_place = dropout, padding, in_place
        # A detached alias: autograd makes this function its history, and does not treat it as a view.
        return (z_TP, x.detach()) if fork else z_TP

    @staticmethod
    def backward(ctx: Any, dz_TP: Tensor, dx: Tensor | None = None) -> Any:
        x, mask_TK, A_GK, W_NK, stack_PK = ctx.saved_tensors
        careful = _is_watched(dz_TP) or is_batched(dx)
        in_place = ctx.in_place and not careful and is_alone(dx, fresh_in_backward())
        with without_autocast(x):
            if stack_PK is None or careful:
                stack_PK = stack(A_GK, W_NK, ctx.padding, x)
            arguments = (dz_TP, dx, x, stack_PK, A_GK.shape[0], 0 if W_NK is None else W_NK.shape[0])
            needs = ctx.needs_input_grad
            if mask_TK is None:
                dx, dA_GK, dW_NK = _shrink_backward(*arguments, needs, in_place)
            else:
                scale = 1.0 / (1.0 - ctx.dropout)
                step = _dropped_shrink_derivative if careful else _dropped_shrink_backward
                dx, dA_GK, dW_NK = step(*arguments, needs, in_place, mask_TK, scale)
        if A_GK.dtype != x.dtype:
            dA_GK = None if dA_GK is None else dA_GK.to(A_GK.dtype)
        if W_NK is not None and W_NK.dtype != x.dtype:
            dW_NK = None if dW_NK is None else dW_NK.to(W_NK.dtype)
        return dx, dA_GK, dW_NK, None, None, None, None


class Expand(torch.autograd.Function):
    """y (…, D) = y0 + s·u Bᵀ with u (T, U) the gated z.

    Called with (y0 (…, D), z (T, P), B (D, U), scaling, gate, in_place, balance); `balance` is the layer's part in the
    balance loss, if any. With `in_place` y overwrites y0, which nobody else may hold. Either way y is an ordinary
    tensor, not a view, and may be changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y0: Tensor,
        z_TP: Tensor,
        B_DU: Tensor,
        scaling: float,
        gate: Gate,
        in_place: bool,
        balance: Attachment | None = None,
    ) -> Tensor:
        B_UD = transposed(B_DU, z_TP)
        u_TU = gated(z_TP, gate)
        ctx.save_for_backward(z_TP, B_DU, B_UD if B_DU.dtype != z_TP.dtype else None)
        ctx.scaling, ctx.gate, ctx.balance = scaling, gate, balance
        if y0.dtype != z_TP.dtype or (not in_place and is_observed()):
            return torch.add(y0, (u_TU @ B_UD).view(y0.shape).to(y0.dtype), alpha=scaling)
        # A detached alias as in Shrink, or a copy. Its 2-D view exists only here, so the result is not a view.
        y = y0.detach() if in_place else y0.clone(memory_format=torch.contiguous_format)
        _as_rows(y).addmm_(u_TU, B_UD, alpha=scaling)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        z_TP, B_DU, B_UD = ctx.saved_tensors
        careful = _is_watched(dy)
        with without_autocast(z_TP):
            if B_UD is None or careful:
                B_UD = transposed(B_DU, z_TP)
            dy_TD = _as_rows(dy)
            if dy_TD.dtype != z_TP.dtype:
                dy_TD = dy_TD.to(z_TP.dtype)
            du_TU = _product_with_transposed(dy_TD, B_UD)
            dz_TP, su_TU = gated_backward(du_TU, z_TP, ctx.scaling, ctx.gate, careful, ctx.balance)
            dB_DU = None
            if ctx.needs_input_grad[2]:
                dB_DU = dy_TD.t() @ su_TU if dy.is_cuda else (su_TU.t() @ dy_TD).t()  # see transposed
                if dB_DU.dtype != B_DU.dtype:
                    dB_DU = dB_DU.to(B_DU.dtype)
        return dy, dz_TP, dB_DU, None, None, None, None


def stack(A_GK: Tensor, W_NK: Tensor | None, padding: int, like: Tensor) -> Tensor:
    """[A; W_g; padding] (P, K) in the dtype of x: the weights are cast, never x.

    Padding repeats rows of A, which needs no extra launch; their columns of z are never read, and their part of dz is
    zero.
    """
    stack = A_GK
    if W_NK is not None:
        parts = [A_GK, W_NK if W_NK.dtype == A_GK.dtype else W_NK.to(A_GK.dtype)]
        stack = torch.cat([*parts, A_GK[:padding]] if padding else parts)
    return stack if stack.dtype == like.dtype else stack.to(like.dtype)


def transposed(B_DU: Tensor, like: Tensor) -> Tensor:
    """Bᵀ (U, D) in the dtype of z.

    On a CPU a copy has one rank per row: products with few columns are several times faster in that layout, and so is
    the gradient of B computed as that of Bᵀ. On CUDA both layouts are equally fast.
    """
    if B_DU.dtype == like.dtype:
        return B_DU.t()
    if like.is_cuda:
        return B_DU.to(like.dtype).t()
    return B_DU.t().to(like.dtype, memory_format=torch.contiguous_format)


def _shrink_backward(
    dz_TP: Tensor, dx: Tensor | None, x: Tensor, stack_PK: Tensor, G: int, N: int, needs: Any, in_place: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx (…, K), dA (G, K), dW_g (N, K)) without dropout; None for those that `needs` leaves out."""
    need_x, need_A, need_W, *_ = needs
    dA_GK = dW_NK = None
    if need_A or need_W:
        dstack_PK = dz_TP.t() @ _as_rows(x)
        dA_GK = dstack_PK[:G] if need_A else None
        dW_NK = dstack_PK[G : G + N] if need_W else None
    if not need_x:
        return None, dA_GK, dW_NK
    return _add_product(dx, dz_TP, stack_PK, in_place, x.shape), dA_GK, dW_NK


def _dropped_shrink_backward(
    dz_TP: Tensor, dx: Tensor | None, x: Tensor, stack_PK: Tensor, G: int, N: int, needs: Any, in_place: bool,
    mask_TK: Tensor, scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The same with dropout before A. The dropped x is recomputed from the mask (one byte per element), not saved."""
    need_x, need_A, need_W, *_ = needs
    x_TK = x.reshape(-1, x.shape[-1])
    dA_GK = dW_NK = None
    buffer_TK = torch.ops.aten.native_dropout_backward(x_TK, mask_TK, scale) if need_A else None
    if buffer_TK is not None:
        dA_GK = dz_TP[:, :G].t() @ buffer_TK
    if need_W:
        dW_NK = dz_TP[:, G : G + N].t() @ x_TK
    if not need_x:
        return None, dA_GK, dW_NK
    buffer_TK = torch.mm(dz_TP[:, :G], stack_PK[:G], out=buffer_TK)
    if dx is None:
        dx = torch.ops.aten.native_dropout_backward(buffer_TK, mask_TK, scale).view(x.shape)
    elif in_place:
        dx.view_as(x_TK).addcmul_(buffer_TK, mask_TK, value=scale)
    else:
        dx = torch.addcmul(dx.reshape(x_TK.shape), buffer_TK, mask_TK, value=scale).view(x.shape)
    if N:
        dx = _add_product(dx, dz_TP[:, G:], stack_PK[G:], True, x.shape)  # dx is our own tensor by now
    return dx, dA_GK, dW_NK


def _dropped_shrink_derivative(
    dz_TP: Tensor, dx: Tensor | None, x: Tensor, stack_PK: Tensor, G: int, N: int, needs: Any, in_place: bool,
    mask_TK: Tensor, scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The same where backward must be careful, see `_is_watched`."""
    need_x, need_A, need_W, *_ = needs
    x_TK, kept_TK = x.reshape(-1, x.shape[-1]), mask_TK.to(x.dtype) * scale
    dA_GK = dz_TP[:, :G].t() @ (x_TK * kept_TK) if need_A else None
    dW_NK = dz_TP[:, G : G + N].t() @ x_TK if need_W else None
    if not need_x:
        return None, dA_GK, dW_NK
    dx_TK = (dz_TP[:, :G] @ stack_PK[:G]) * kept_TK
    if N:
        dx_TK = dx_TK + dz_TP[:, G:] @ stack_PK[G:]
    dx_sum = dx_TK.reshape(x.shape)
    return dx_sum if dx is None else dx + dx_sum, dA_GK, dW_NK


def _add_product(
    dx: Tensor | None, left_TP: Tensor, right_PK: Tensor, in_place: bool, shape: torch.Size
) -> Tensor:
    """dx (…, K) plus the product, in place if `in_place`."""
    if dx is None:
        return (left_TP @ right_PK).view(shape)
    if in_place:
        _as_rows(dx).addmm_(left_TP, right_PK)
        return dx
    return torch.addmm(_as_rows(dx), left_TP, right_PK).view(shape)


def _as_rows(x: Tensor) -> Tensor:
    """x (…, K) as (T, K): x itself, a view, or a copy where there is no view."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _is_watched(gradient: Tensor) -> bool:
    """Whether backward must be careful: use differentiable operations and overwrite nobody else's results.

    That is where backward itself is differentiated (`create_graph`) or transformed (vmap over gradients), or where
    someone sees, and may hold, the results of single operations.
    """
    return torch.is_grad_enabled() or is_transformed() or is_observed() or is_batched(gradient)


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast: forward has cast its input, and gradients have the precision of forward."""
    if is_autocasting() and (device := like.device.type) != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NO_CONTEXT


_NO_CONTEXT = nullcontext()
