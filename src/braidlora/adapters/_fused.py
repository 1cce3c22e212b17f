"""The layer as autograd functions that read and write full-width tensors as rarely as possible.

Any base layer runs between two of them, so that both gradients of x meet in `Shrink` and are added in place:

    x ──► Shrink ──► x ──► base layer ──► y0 ──► Expand ──► y
             └────────► z = [x Aᵀ | x W_gᵀ] ──────┘

A plain frozen linear layer is a product that `AdaptedLinear` runs itself: one function instead of three. The operations
are the same, and at small sizes, where the functions and the questions between them take the time, it is faster.

Full-width passes of the adapter, forward and backward, whatever N is: forward reads x twice and updates y0; backward
reads dy twice and x once, and updates the base layer's dx. Besides x only z is saved, and nothing else with T rows: the
gate weights and the mix are recomputed in backward. Copies of weights are kept where they had to be cast.

Suffixes: T tokens, K in_features, D out_features, N experts, G rows of the stacked A, U columns of the stacked B,
P ≥ G + N columns of z.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from braidlora.adapters._balance import Attachment
from braidlora.adapters._gate import Gate, gated
from braidlora.adapters._products import (
    as_rows,
    expand_backward,
    linear,
    shrink,
    shrink_again,
    shrink_backward,
    transposed,
)
from braidlora.adapters._torch_state import (
    fresh_in_backward,
    is_alone,
    is_autocasting,
    is_batched,
    is_observed,
    is_transformed,
)


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
        z_TP, mask_TK, stack_PK = shrink(x, A_GK, W_NK, dropout, padding)
        ctx.save_for_backward(x, mask_TK, A_GK, W_NK, stack_PK if A_GK.dtype != x.dtype else None)
        ctx.dropout, ctx.padding, ctx.in_place = dropout, padding, in_place
        # A detached alias: autograd makes this function its history, and does not treat it as a view.
        return (z_TP, x.detach()) if fork else z_TP

    @staticmethod
    def backward(ctx: Any, dz_TP: Tensor, dx: Tensor | None = None) -> Any:
        saved = ctx.saved_tensors
        careful = is_watched(dz_TP) or is_batched(dx)
        in_place = ctx.in_place and not careful and is_alone(dx, fresh_in_backward())
        with without_autocast(saved[0]):
            dx, dA_GK, dW_NK = shrink_backward(
                dz_TP, dx, saved, ctx.needs_input_grad, ctx.dropout, ctx.padding, in_place, careful
            )
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
        as_rows(y).addmm_(u_TU, B_UD, alpha=scaling)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        saved = ctx.saved_tensors
        z_TP = saved[0]
        with without_autocast(z_TP):
            dy_TD = as_rows(dy)
            dz_TP, dB_DU = expand_backward(
                dy_TD if dy_TD.dtype == z_TP.dtype else dy_TD.to(z_TP.dtype),
                saved, ctx.needs_input_grad[2], ctx.scaling, ctx.gate, ctx.balance, is_watched(dy),
            )  # fmt: skip
        return dy, dz_TP, dB_DU, None, None, None, None


class AdaptedLinear(torch.autograd.Function):
    """y (…, D) = x W0ᵀ + b + s·u Bᵀ with u (T, U) the gated z (T, P) = [drop(x) Aᵀ | x W_gᵀ | padding].

    Called with (x (…, K), W0 (D, K), b (D,) or None, A (G, K), W_g (N, K) or None, B (D, U), settings): dropout,
    padding, scaling, gate and balance, as one. x, W0 and b have one dtype, and W0 and b are frozen. y is an ordinary
    tensor, as that of `Expand`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W0_DK: Tensor,
        bias_D: Tensor | None,
        A_GK: Tensor,
        W_NK: Tensor | None,
        B_DU: Tensor,
        settings: tuple[float, int, float, Gate, Attachment | None],
    ) -> Tensor:
        dropout, padding, scaling, gate, _ = settings
        z_TP, mask_TK, stack_PK = shrink(x, A_GK, W_NK, dropout, padding)
        y_TD = linear(as_rows(x), W0_DK, bias_D)
        B_UD = transposed(B_DU, x)
        ctx.save_for_backward(
            x, mask_TK, A_GK, W_NK, stack_PK if A_GK.dtype != x.dtype else None,
            z_TP, B_DU, B_UD if B_DU.dtype != x.dtype else None,
            W0_DK if ctx.needs_input_grad[0] else None,
        )  # fmt: skip
        ctx.settings = settings
        y_TD.addmm_(gated(z_TP, gate), B_UD, alpha=scaling)
        return (
            y_TD if x.dim() == 2 else y_TD.view(*x.shape[:-1], y_TD.shape[1]).detach()
        )  # no view for autograd

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *saved, z_TP, B_DU, B_UD, W0_DK = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        x, careful = saved[0], is_watched(dy)
        with without_autocast(x):
            dy_TD = as_rows(dy)
            dropout, padding, scaling, gate, balance = ctx.settings
            if careful:  # the saved z has no history
                z_TP = shrink_again(x, saved[1], saved[2], saved[3], dropout, padding)
            dz_TP, dB_DU = expand_backward(
                dy_TD, (z_TP, B_DU, B_UD), needs[2], scaling, gate, balance, careful
            )
            dx = (dy_TD @ W0_DK).view(x.shape) if needs_x else None
            dx, dA_GK, dW_NK = shrink_backward(
                dz_TP, dx, tuple(saved), (needs_x, *needs), dropout, padding, not careful, careful
            )
        return dx, None, None, dA_GK, dW_NK, dB_DU, None


def is_watched(gradient: Tensor) -> bool:
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
