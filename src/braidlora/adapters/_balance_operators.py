"""The balance loss's custom operators, for compiled code: see `_balance`. They refer to a scope by its number.

Each returns a copy, so that later operations of backward depend on it and cannot be moved before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@torch.library.custom_op("braidlora::balance_mark", mutates_args=())
def mark(x: Tensor, mask: Tensor | None, share: Tensor | None, is_loss: bool, scope: int) -> Tensor:
    """x; backward records the gradient that arrives, the mask and the share."""
    return x.clone()


@torch.library.custom_op("braidlora::balance_begin", mutates_args=(), tags=_TAGS)
def begin(gradient: Tensor, mask: Tensor | None, share: Tensor | None, is_loss: bool, scope: int) -> Tensor:
    from braidlora.adapters._balance import scope_of

    noted = gradient.clone()
    scope_of(scope).begin(noted, None, mask if mask is None else mask.clone(), share, is_loss)
    return gradient.clone()


@torch.library.custom_op("braidlora::balance_attach", mutates_args=())
def attach(w_TN: Tensor, coefficient: float, leading: list[int], scope: int) -> Tensor:
    """w; backward adds the gradient of the balance loss."""
    return w_TN.clone()


@torch.library.custom_op("braidlora::balance_add", mutates_args=(), tags=_TAGS)
def add(gradient_TN: Tensor, w_TN: Tensor, coefficient: float, leading: list[int], scope: int) -> Tensor:
    from braidlora.adapters._balance import Attachment, scope_of

    return gradient_TN + Attachment(scope_of(scope), coefficient, leading).gradient(w_TN)


for _operator in (mark, begin, attach, add):
    _operator.register_fake(lambda x, *rest: torch.empty_like(x))


def _mark_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, mask, share, ctx.is_loss, ctx.scope = inputs
    ctx.save_for_backward(mask, share)


def _mark_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    return begin(gradient, *ctx.saved_tensors, ctx.is_loss, ctx.scope), None, None, None, None


def _attach_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    w_TN, ctx.coefficient, ctx.leading, ctx.scope = inputs
    ctx.save_for_backward(w_TN)


def _attach_backward(ctx, gradient_TN):  # type: ignore[no-untyped-def]
    (w_TN,) = ctx.saved_tensors
    return add(gradient_TN, w_TN, ctx.coefficient, ctx.leading, ctx.scope), None, None, None


mark.register_autograd(_mark_backward, setup_context=_mark_context)
attach.register_autograd(_attach_backward, setup_context=_attach_context)
