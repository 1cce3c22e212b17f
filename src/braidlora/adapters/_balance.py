"""The balance loss: each layer adds its gradient to that of the router, in the scale of the loss.

A layer sees neither the loss nor the attention mask, and under gradient checkpointing only its result leaves it. But
every backward pass begins at the loss. So a model with a balance loss marks its outputs with an identity, whose
backward runs before that of any layer and records two things: the gradient that arrives, which is the scale of the
loss (1/k in gradient accumulation, a loss scaler's factor, …), and the mask. The layers read both in their backward.

    model(…, labels) ──► loss ──► [mark] ──► loss / k ──► backward
                                    │ scale 1/k, mask
                  layers' backward ◄┘ router gradient += coefficient · scale · ∇ balance

In compiled code the marks and the layers' part are custom operators, which run as Python whatever is compiled around
them. Under function transforms the balance losses are collected in forward and added to the loss, minus their value.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from braidlora.adapters import _balance_operators as operators
from braidlora.adapters._model_io import (
    attention_mask,
    loss_of,
    mask_of_tokens,
    share_of_step,
    with_loss,
    with_tensors,
)
from braidlora.adapters._torch_state import at_the_end_of_backward, is_transformed
from braidlora.adapters.functional import balance_gradient, balance_loss

_numbers = itertools.count()
_scopes: weakref.WeakValueDictionary[int, BalanceScope] = weakref.WeakValueDictionary()


class _Note(NamedTuple):
    """What a mark records: the scale of the loss, None where the model did not compute it, and the mask (B, L)."""

    scale: Tensor | None
    mask: Tensor | None


@dataclass(eq=False)
class _Forward:
    """One forward pass of the model: its mask (B, L), and the balance losses collected under function transforms."""

    mask: Tensor | None
    collected: list[Tensor]


class BalanceScope:
    """What the layers of one model share: notes on the current backward pass, which are dropped when it ends."""

    def __init__(self) -> None:
        self.number = next(_numbers)  # its name in compiled code
        _scopes[self.number] = self
        # By the forward pass that a mark belongs to, and by device for layers that do not know their pass: those that a
        # reentrant checkpoint reruns, and compiled ones. They use the pass whose mark was reached last.
        self._notes: dict[Any, _Note] = {}
        self._latest: _Note | None = None
        self._claim: Tensor | None = None
        self._warned = False
        self._forward = threading.local()

    def __reduce__(self) -> tuple[type[BalanceScope], tuple[()]]:
        return BalanceScope, ()  # a copied model has its own notes

    @property
    def forward(self) -> _Forward | None:
        """The model's current forward pass in this thread, if any."""
        return getattr(self._forward, "current", None)

    # ---- in backward

    def begin(
        self,
        gradient: Tensor,
        forward: _Forward | None,
        mask: Tensor | None,
        share: Tensor | None,
        is_loss: bool,
    ) -> None:
        """Record that backward has reached a mark."""
        scale = (gradient if share is None else gradient * share) if is_loss else self._claim
        note = self._latest = self._notes[forward] = self._notes[gradient.device] = _Note(scale, mask)

        def end() -> None:
            self._notes = {key: known for key, known in self._notes.items() if known is not note}
            self._latest = None if self._latest is note else self._latest

        at_the_end_of_backward(end)

    def claim(self, gradient: Tensor, share: Tensor | float) -> None:
        """Record that backward has reached a loss that the model did not compute, see `with_balance_loss`."""
        claim = self._claim = gradient * share

        def end() -> None:
            self._claim = None if self._claim is claim else self._claim

        at_the_end_of_backward(end)

    def note_for(self, forward: _Forward | None, device: torch.device) -> _Note:
        """The note on a layer's forward pass, with the scale of a claimed loss where it has none of its own."""
        note = self._notes.get(device, self._latest) if forward is None else self._notes.get(forward)
        if note is None:
            return _Note(self._claim, None if forward is None else forward.mask)
        return note if note.scale is not None else _Note(self._claim, note.mask)

    def warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "balance_loss: the loss was not computed by the model, so its scale is unknown, and the balance loss "
                "is added unscaled, once per backward pass. Pass `labels` to the model, or call "
                "`braidlora.adapters.with_balance_loss(model, loss)` on your loss before anything scales it.",
                stacklevel=2,
            )

    # ---- around the model's forward

    def before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._forward.current = _Forward(attention_mask(model, args, kwargs), [])

    def after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The output, marked; None, which keeps it, where there is nothing to mark."""
        if torch.compiler.is_compiling():
            forward, mask = None, attention_mask(model, args, kwargs)
        else:
            forward, self._forward.current = self._forward.current, None
            mask = forward.mask
        loss = loss_of(output)
        if forward is not None and forward.collected:
            return self._with_collected(output, loss, forward.collected)
        if not torch.is_grad_enabled() or torch.jit.is_tracing():
            return None

        def mark(tensor: Tensor, share: Tensor | None = None, is_loss: bool = False) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            if torch.compiler.is_compiling():
                return operators.mark(tensor, mask, share, is_loss, self.number)
            marked: Tensor = _Mark.apply(tensor, forward, mask, share, is_loss, self)
            return marked

        if loss is not None:
            return with_loss(output, mark(loss, share_of_step(model, kwargs), True))
        return with_tensors(output, mark)

    def attach(self, w_TN: Tensor, coefficient: float, leading: Sequence[int]) -> Tensor:
        """w (T, N), unchanged; backward adds the gradient of the balance loss. For plain operations."""
        if torch.compiler.is_compiling():
            return operators.attach(w_TN, coefficient, list(leading), self.number)
        if not is_transformed():
            attached: Tensor = _Attach.apply(w_TN, Attachment(self, coefficient, leading))
            return attached
        if self.forward is None:
            warnings.warn(
                "balance_loss is ignored: under a function transform it needs the forward of the full model",
                stacklevel=2,
            )
        else:
            mask_T = mask_of_tokens(self.forward.mask, leading, w_TN.device)
            self.forward.collected.append(coefficient * balance_loss(w_TN, mask_T))
        return w_TN

    @staticmethod
    def _with_collected(output: Any, loss: Tensor | None, collected: list[Tensor]) -> Any:
        if loss is None:
            warnings.warn(
                "balance_loss is ignored: under a function transform the model must compute the loss (pass `labels`)",
                stacklevel=2,
            )
            return None
        total = torch.stack(collected).sum().to(loss.device)
        return with_loss(output, loss + (total - total.detach()).to(loss.dtype))


class Attachment:
    """One layer in one forward pass: what the balance loss adds to the gradient of its gate weights.

    Args:
        scope: the layer's.
        coefficient: the weight of the balance loss.
        leading: the shape of the layer's tokens.
    """

    def __init__(self, scope: BalanceScope, coefficient: float, leading: Sequence[int]) -> None:
        self.scope, self.coefficient, self.leading = scope, coefficient, leading
        self.forward = scope.forward
        self._differentiated = False

    def gradient(self, w_TN: Tensor) -> Tensor:
        """(T, N), or (1, N) if it is the same for all tokens."""
        scale, mask = self.scope.note_for(self.forward, w_TN.device)
        if scale is None and self._differentiated:
            # These are second derivatives; the balance loss is in the first ones, whose graph has its own.
            return torch.zeros_like(w_TN[:1])
        self._differentiated |= torch.is_grad_enabled()
        gradient = self.coefficient * balance_gradient(w_TN, mask_of_tokens(mask, self.leading, w_TN.device))
        if scale is None:
            self.scope.warn_once()
            return gradient
        return gradient * scale.to(w_TN)


class _Mark(torch.autograd.Function):
    """Identity; backward records the gradient that arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: _Forward | None,
        mask: Tensor | None,
        share: Tensor | None,
        is_loss: bool,
        scope: BalanceScope,
    ) -> Tensor:
        ctx.noted, ctx.scope = (forward, mask, share, is_loss), scope
        # An alias of logits, which autograd does not treat as a view.
        return x.clone() if is_loss else x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.scope.begin(gradient, *ctx.noted)
        return gradient, None, None, None, None, None


class _Claim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: Tensor | float, scopes: list[BalanceScope]) -> Tensor:
        ctx.share, ctx.scopes = share, scopes
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        for scope in ctx.scopes:
            scope.claim(gradient, ctx.share)
        return gradient, None, None


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_TN: Tensor, attachment: Attachment) -> Tensor:
        ctx.save_for_backward(w_TN)
        ctx.attachment = attachment
        return w_TN.clone()

    @staticmethod
    def backward(ctx: Any, gradient_TN: Tensor) -> Any:
        (w_TN,) = ctx.saved_tensors
        return gradient_TN + ctx.attachment.gradient(w_TN), None


def with_balance_loss(model: nn.Module, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """The loss, unchanged, such that its backward trains the routers on the balance loss too, in the same scale.

    For a loss computed from the model's logits; a loss that the model computes from `labels` needs no call. Call it
    before the loss is divided by the number of accumulated passes, scaled or averaged.

    Args:
        model: a model with multi-LoRA layers, wrapped or not. Without a balance loss, the loss is returned.
        loss: a scalar whose graph leads through the model, in one forward pass or several.
        share: this pass's tokens over the step's, if the loss is already divided by the number of tokens of the full
            step; 1 for a mean over this pass's own tokens.
    """
    scopes = balance_scopes(model)
    return claim_balance_loss(scopes, loss, share) if scopes else loss


def claim_balance_loss(scopes: list[BalanceScope], loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """`with_balance_loss`, given the model's scopes."""
    marked: Tensor = _Claim.apply(loss, share, scopes)
    return marked


def balance_scopes(model: nn.Module) -> list[BalanceScope]:
    """The scopes of the model's layers that have a balance loss."""
    balanced = (layer for layer in _layers(model) if any(gate.balance for gate in layer.gate.values()))
    return list(dict.fromkeys(layer.balance for layer in balanced))


def share_scope(model: nn.Module) -> None:
    """Give all layers of a model with a balance loss one scope, and make the model mark its outputs.

    The hooks are removed from a model without a balance loss.
    """
    if not balance_scopes(model):
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), BalanceScope):
                    del hooks[key]
        return
    layers = _layers(model)
    watching = {getattr(hook, "__self__", None) for hook in model._forward_hooks.values()}
    scope = next((layer.balance for layer in layers if layer.balance in watching), layers[0].balance)
    for layer in layers:
        layer.balance = scope
    if scope not in watching:
        model.register_forward_pre_hook(scope.before_forward, with_kwargs=True)
        model.register_forward_hook(scope.after_forward, with_kwargs=True)


def _layers(model: nn.Module) -> list[Any]:
    return [
        module for module in model.modules() if isinstance(getattr(module, "balance", None), BalanceScope)
    ]


def scope_of(number: int) -> BalanceScope:
    """The scope with this number, by which compiled code names it."""
    return _scopes[number]
