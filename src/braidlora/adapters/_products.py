"""The products of the fused layer, forward and backward, as the autograd functions of `_fused` run them.

Suffixes: T tokens, K in_features, D out_features, N experts, G rows of the stacked A, U columns of the stacked B,
P ≥ G + N columns of z.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from braidlora.adapters._balance import Attachment
from braidlora.adapters._gate import Gate, gated_backward
from braidlora.adapters._torch_state import is_observed

# (x, W, b) ↦ x Wᵀ + b, torch's own: what a patch of torch.nn.functional returns may be held by others.
linear = torch._C._nn.linear

_FEW = 64  # tokens; chosen on an Intel Xeon, and only a matter of speed


def as_rows(x: Tensor) -> Tensor:
    """x (…, K) as (T, K): x itself, a view, or a copy where there is no view."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


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
    """Bᵀ (U, D) in the dtype of z: a view, or a copy that has one rank per row on a CPU.

    Products with few columns are faster there in that layout, but not by as much as a copy costs. On CUDA both layouts
    are equally fast.
    """
    if B_DU.dtype == like.dtype:
        return B_DU.t()
    if like.is_cuda:
        return B_DU.to(like.dtype).t()
    return B_DU.t().to(like.dtype, memory_format=torch.contiguous_format)


def shrink(
    x: Tensor, A_GK: Tensor, W_NK: Tensor | None, dropout: float, padding: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """z (T, P) = [drop(x) Aᵀ | x W_gᵀ | padding], the mask of the dropout (T, K) if any, and the stack (P, K)."""
    x_TK = as_rows(x)
    stack_PK = stack(A_GK, W_NK, padding, x)
    if dropout == 0.0:
        return linear(x_TK, stack_PK), None, stack_PK
    G = A_GK.shape[0]
    dropped_TK, mask_TK = torch.native_dropout(x_TK, dropout, True)
    if is_observed():  # a selective checkpoint may return the cached `out=` tensor without writing it
        z_TP = dropped_TK @ stack_PK[:G].t()
        if W_NK is not None:
            z_TP = torch.cat([z_TP, x_TK @ stack_PK[G:].t()], 1)
        return z_TP, mask_TK, stack_PK
    z_TP = x_TK.new_empty(x_TK.shape[0], stack_PK.shape[0])
    torch.mm(dropped_TK, stack_PK[:G].t(), out=z_TP[:, :G])
    if W_NK is not None:
        torch.mm(x_TK, stack_PK[G:].t(), out=z_TP[:, G:])
    return z_TP, mask_TK, stack_PK


def shrink_again(
    x: Tensor, mask_TK: Tensor | None, A_GK: Tensor, W_NK: Tensor | None, dropout: float, padding: int
) -> Tensor:
    """z (T, P) of a `shrink` once more, in operations that can be differentiated."""
    x_TK, stack_PK, G = as_rows(x), stack(A_GK, W_NK, padding, x), A_GK.shape[0]
    if mask_TK is None:
        return x_TK @ stack_PK.t()
    h_TG = (x_TK * (mask_TK.to(x.dtype) / (1.0 - dropout))) @ stack_PK[:G].t()
    return h_TG if W_NK is None else torch.cat([h_TG, x_TK @ stack_PK[G:].t()], 1)


def shrink_backward(
    dz_TP: Tensor,
    dx: Tensor | None,
    saved: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None],
    needs: Sequence[bool],
    dropout: float,
    padding: int,
    in_place: bool,
    careful: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx (…, K), dA (G, K), dW_g (N, K)); those that `needs` leaves out may be None.

    Args:
        dz_TP: gradient of z.
        dx: what to add the gradient of x to, if anything; in place, with `in_place`.
        saved: x, the mask, A, W_g and the stack, or None instead of a stack that is not kept.
        careful: see `_fused.is_watched`.
    """
    x, mask_TK, A_GK, W_NK, stack_PK = saved
    need_x = needs[0]
    if need_x and (stack_PK is None or careful):
        stack_PK = stack(A_GK, W_NK, padding, x)
    N = 0 if W_NK is None else W_NK.shape[0]
    arguments = (dz_TP, dx, x, stack_PK if need_x else None, A_GK.shape[0], N, needs[1], needs[2], in_place)
    if mask_TK is None:
        dx, dA_GK, dW_NK = _shrink_backward(*arguments)
    else:
        step = _dropped_shrink_derivative if careful else _dropped_shrink_backward
        dx, dA_GK, dW_NK = step(*arguments, mask_TK, 1.0 / (1.0 - dropout))
    if dA_GK is not None and dA_GK.dtype != A_GK.dtype:
        dA_GK = dA_GK.to(A_GK.dtype)
    if dW_NK is not None and W_NK is not None and dW_NK.dtype != W_NK.dtype:
        dW_NK = dW_NK.to(W_NK.dtype)
    return dx, dA_GK, dW_NK


def expand_backward(
    dy_TD: Tensor,
    saved: tuple[Tensor, Tensor, Tensor | None],
    needs_B: bool,
    scaling: float,
    gate: Gate,
    balance: Attachment | None,
    careful: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dz (T, P), dB (D, U) if needed) of y = y0 + s·u Bᵀ with the gated u.

    Args:
        dy_TD: gradient of y, in the dtype of z.
        saved: z, B, and Bᵀ or None if it is not kept.
    """
    z_TP, B_DU, B_UD = saved
    if B_UD is None or careful:
        B_UD = transposed(B_DU, z_TP)
    dz_TP, su_TU = gated_backward(linear(dy_TD, B_UD), z_TP, scaling, gate, careful, balance)
    if not needs_B:
        return dz_TP, None
    # On a CPU as the gradient of Bᵀ, which is several times faster, but for few tokens not worth a copy of it.
    direct = dy_TD.is_cuda or dy_TD.shape[0] <= _FEW
    dB_DU = dy_TD.t() @ su_TU if direct else (su_TU.t() @ dy_TD).t()
    return dz_TP, dB_DU if dB_DU.dtype == B_DU.dtype else dB_DU.to(B_DU.dtype)


def _shrink_backward(
    dz_TP: Tensor, dx: Tensor | None, x: Tensor, stack_PK: Tensor | None, G: int, N: int,
    need_A: bool, need_W: bool, in_place: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`shrink_backward` without dropout; the gradient of x is needed if there is a stack."""
    dA_GK = dW_NK = None
    if need_A or need_W:
        dA_GK = dz_TP.t() @ as_rows(x)
        if N:
            # Not by `split`, whose views cannot be changed in place.
            dA_GK, dW_NK = dA_GK[:G], dA_GK[G : G + N]
    if stack_PK is None:
        return None, dA_GK, dW_NK
    return _add_product(dx, dz_TP, stack_PK, in_place, x.shape), dA_GK, dW_NK


def _dropped_shrink_backward(
    dz_TP: Tensor, dx: Tensor | None, x: Tensor, stack_PK: Tensor | None, G: int, N: int,
    need_A: bool, need_W: bool, in_place: bool, mask_TK: Tensor, scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The same with dropout before A. The dropped x is recomputed from the mask (one byte per element), not saved."""
    x_TK = as_rows(x)
    dA_GK = dW_NK = None
    buffer_TK = torch.ops.aten.native_dropout_backward(x_TK, mask_TK, scale) if need_A else None
    if buffer_TK is not None:
        dA_GK = dz_TP[:, :G].t() @ buffer_TK
    if need_W:
        dW_NK = dz_TP[:, G : G + N].t() @ x_TK
    if stack_PK is None:
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
    dz_TP: Tensor, dx: Tensor | None, x: Tensor, stack_PK: Tensor | None, G: int, N: int,
    need_A: bool, need_W: bool, in_place: bool, mask_TK: Tensor, scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The same where backward must be careful."""
    x_TK, kept_TK = as_rows(x), mask_TK.to(x.dtype) * scale
    dA_GK = dz_TP[:, :G].t() @ (x_TK * kept_TK) if need_A else None
    dW_NK = dz_TP[:, G : G + N].t() @ x_TK if need_W else None
    if stack_PK is None:
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
        as_rows(dx).addmm_(left_TP, right_PK)
        return dx
    return torch.addmm(as_rows(dx), left_TP, right_PK).view(shape)
