"""The balance loss follows the loss: its gradient is added where the router's gradient is, in the loss's own scale.

A layer sees neither the loss nor the attention mask, and under gradient checkpointing nothing but a layer's result
leaves it. Yet every backward pass begins at the loss. So a model with a balance loss marks what it returns with an
identity whose backward runs before that of any layer, and notes down what arrives there: the gradient of the loss with
respect to itself, which is the loss's scale (1/k in gradient accumulation, the scaler's factor, …), and the mask. The
layers read the notes in their own backward.

    model(…, labels) ──► loss ──► [mark] ──► loss / k ──► backward
                                    │ scale 1/k, mask
                  layers' backward ◄┘ router gradient += coefficient · scale · ∇ balance

In compiled code the marks and the layers' part are custom operators, which run as Python whatever the compiler makes
of the rest. Under function transforms the balance losses are collected in forward and added to the loss, less their
value.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from braidlora.adapters import _balance_operators as operators
from braidlora.adapters._torch_state import at_the_end_of_backward, is_transformed
from braidlora.adapters.functional import balance_gradient, balance_loss

_IGNORED = -100
_SHIFTED_LOSSES = (
    "ForCausalLM",
    "ForConditionalGeneration",
)  # transformers' names of losses of the next token
_numbers = itertools.count()
_scopes: weakref.WeakValueDictionary[int, BalanceScope] = weakref.WeakValueDictionary()


class _Note(NamedTuple):
    """What a mark notes down: the loss's scale, None where the loss is not the model's, and the mask (B, L)."""

    scale: Tensor | None
    mask: Tensor | None


@dataclass(eq=False)
class _Forward:
    """One forward pass of the model: its mask (B, L), and the balance losses collected under function transforms."""

    mask: Tensor | None
    collected: list[Tensor]


class BalanceScope:
    """What the layers of one model share: the notes on the backward pass at hand. They are dropped when it ends."""

    def __init__(self) -> None:
        self.number = next(_numbers)  # how compiled code names it
        _scopes[self.number] = self
        # By the forward pass that a mark belongs to, and by device for layers that know no pass: those that a
        # reentrant checkpoint runs again, and compiled ones. They take the pass whose mark was reached last.
        self._notes: dict[Any, _Note] = {}
        self._latest: _Note | None = None
        self._claim: Tensor | None = None
        self._warned = False
        self._forward = threading.local()

    def __reduce__(self) -> tuple[type[BalanceScope], tuple[()]]:
        return BalanceScope, ()  # a copied model has notes of its own

    @property
    def forward(self) -> _Forward | None:
        """The model's forward pass at hand, if it is one of this thread's."""
        return getattr(self._forward, "at_hand", None)

    # ---- in backward

    def begin(
        self,
        gradient: Tensor,
        forward: _Forward | None,
        mask: Tensor | None,
        share: Tensor | None,
        is_loss: bool,
    ) -> None:
        """A mark has been reached."""
        scale = (gradient if share is None else gradient * share) if is_loss else self._claim
        note = self._latest = self._notes[forward] = self._notes[gradient.device] = _Note(scale, mask)

        def end() -> None:
            self._notes = {key: known for key, known in self._notes.items() if known is not note}
            self._latest = None if self._latest is note else self._latest

        at_the_end_of_backward(end)

    def claim(self, gradient: Tensor, share: Tensor | float) -> None:
        """A loss that is not the model's has been reached, see `with_balance_loss`."""
        claim = self._claim = gradient * share

        def end() -> None:
            self._claim = None if self._claim is claim else self._claim

        at_the_end_of_backward(end)

    def note_for(self, forward: _Forward | None, device: torch.device) -> _Note:
        """The note on a layer's forward pass, with the scale of a claimed loss where there is no other."""
        note = self._notes.get(device, self._latest) if forward is None else self._notes.get(forward)
        if note is None:
            return _Note(self._claim, None if forward is None else forward.mask)
        return note if note.scale is not None else _Note(self._claim, note.mask)

    def warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "balance_loss: the loss was not computed by the model, so its scale is not known, and the balance loss "
                "is added as it is, once per backward pass. Give the model `labels`, or call "
                "`braidlora.adapters.with_balance_loss(model, loss)` on your loss before anything scales it.",
                stacklevel=2,
            )

    # ---- around the model's forward

    def before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._forward.at_hand = _Forward(_attention_mask(model, args, kwargs), [])

    def after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The output, marked; None, which leaves it as it is, where there is nothing to mark."""
        if torch.compiler.is_compiling():
            forward, mask = None, _attention_mask(model, args, kwargs)
        else:
            forward, self._forward.at_hand = self._forward.at_hand, None
            mask = forward.mask
        loss = _loss_of(output)
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
            return _with_loss(output, mark(loss, _share_of_step(model, kwargs), True))
        return _each_tensor(output, mark)

    def attach(self, w_TN: Tensor, coefficient: float, leading: Sequence[int]) -> Tensor:
        """w (T, N), unchanged; in backward the router is trained on the balance loss as well. For plain operations."""
        if torch.compiler.is_compiling():
            return operators.attach(w_TN, coefficient, list(leading), self.number)
        if not is_transformed():
            attached: Tensor = _Attach.apply(w_TN, Attachment(self, coefficient, leading))
            return attached
        if self.forward is None:
            warnings.warn(
                "balance_loss is left out: under a function transform it needs the whole model's forward",
                stacklevel=2,
            )
        else:
            mask_T = _mask_of(self.forward.mask, leading, w_TN.device)
            self.forward.collected.append(coefficient * balance_loss(w_TN, mask_T))
        return w_TN

    @staticmethod
    def _with_collected(output: Any, loss: Tensor | None, collected: list[Tensor]) -> Any:
        if loss is None:
            warnings.warn(
                "balance_loss is left out: under a function transform the loss must be the model's (give it `labels`)",
                stacklevel=2,
            )
            return None
        total = torch.stack(collected).sum().to(loss.device)
        return _with_loss(output, loss + (total - total.detach()).to(loss.dtype))


class Attachment:
    """A layer's part in one forward pass: what the balance loss adds to the gradient of its gate weights.

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
        """(T, N), or (1, N) for all tokens alike."""
        scale, mask = self.scope.note_for(self.forward, w_TN.device)
        if scale is None and self._differentiated:
            # What arrives are second derivatives; the balance loss is in the first ones, whose graph brings its own.
            return torch.zeros_like(w_TN[:1])
        self._differentiated |= torch.is_grad_enabled()
        gradient = self.coefficient * balance_gradient(w_TN, _mask_of(mask, self.leading, w_TN.device))
        if scale is None:
            self.scope.warn_once()
            return gradient
        return gradient * scale.to(w_TN)


class _Mark(torch.autograd.Function):
    """Identity; backward notes down what arrives."""

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
        return (
            x.clone() if is_loss else x.detach()
        )  # an alias of logits, which autograd does not take for a view

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
    """The loss, unchanged, with the model's balance loss behind it: backward trains the routers on both, in one scale.

    For a loss that is computed from the model's logits; one that the model computes from `labels` needs no call. Call
    it before the loss is divided by the number of accumulated passes, scaled or averaged.

    Args:
        model: a model with multi-LoRA layers, wrapped or not. Without a balance loss the loss is returned as it is.
        loss: a scalar whose graph leads through the model, in one forward pass or several.
        share: what part of a step the loss is, where it is normalized by the whole step's number of tokens already:
            this pass's tokens over the step's. 1 for a mean over this pass's own tokens.
    """
    scopes = balance_scopes(model)
    return claim_balance_loss(scopes, loss, share) if scopes else loss


def claim_balance_loss(scopes: list[BalanceScope], loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """`with_balance_loss` for the scopes of a model that are known."""
    marked: Tensor = _Claim.apply(loss, share, scopes)
    return marked


def balance_scopes(model: nn.Module) -> list[BalanceScope]:
    """The scopes of the model's layers that have a balance loss."""
    balanced = (layer for layer in _layers(model) if any(gate.balance for gate in layer.gate.values()))
    return list(dict.fromkeys(layer.balance for layer in balanced))


def share_scope(model: nn.Module) -> None:
    """Give all layers of a model that has a balance loss one scope, and have the model mark what it returns.

    A model that has none, or no longer, is left without hooks of ours.
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
    """The scope that compiled code names by its number."""
    return _scopes[number]


def _mask_of(mask: Tensor | None, leading: Sequence[int], device: torch.device) -> Tensor | None:
    """The mask (T,) of tokens of shape `leading`, as they are or flattened; None where it is not theirs."""
    if mask is None or tuple(leading) not in (tuple(mask.shape), (mask.numel(),)):
        return None
    return mask.reshape(-1).to(device)


def _attention_mask(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Which tokens of a batch (B, L) are no padding; None where that is not known.

    An encoder-decoder has tokens of two kinds, which their shape does not always tell apart.
    """
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        names = list(inspect.signature(model.forward).parameters)[: len(args)]
        mask = args[names.index("attention_mask")] if "attention_mask" in names else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return None if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else mask != 0


def _share_of_step(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """What part of an optimizer step this pass is, where the loss is divided by the tokens of the whole step.

    transformers' Trainer passes their number on as `num_items_in_batch`; it counts targets as here.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs.get("labels")
        config = getattr(model, "config", None)
        shifted = getattr(model, "loss_type", None) in _SHIFTED_LOSSES
        if isinstance(labels, Tensor) and shifted and not getattr(config, "is_encoder_decoder", False):
            labels = labels[..., 1:]
    if items is None or not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return None  # losses of whole sequences are means whatever that number is
    targets = labels.ne(_IGNORED).sum()
    return targets / (items.to(targets.device).reshape(-1)[0] if isinstance(items, Tensor) else items)


def _loss_of(output: Any) -> Tensor | None:
    """The loss among what a model returns: by its name, or as the only or the first tensor, if it is a scalar."""
    if isinstance(output, dict):
        loss = output.get("loss")
    elif isinstance(output, (list, tuple)) and not hasattr(output, "loss"):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", output)
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point() else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, dict):
        output["loss"] = loss
    elif hasattr(output, "_replace"):
        return (
            output._replace(loss=loss)
            if hasattr(output, "loss")
            else output._replace(**{output._fields[0]: loss})
        )
    elif isinstance(output, (list, tuple)):
        return type(output)([loss, *output[1:]])
    else:
        output.loss = loss
    return output


def _each_tensor(output: Any, change: Any) -> Any:
    """The output with every floating-point tensor in it changed; caches and other objects stay as they are."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else output
    if isinstance(output, dict):
        for key, value in list(output.items()):
            output[key] = _each_tensor(value, change)
        return output
    if isinstance(output, (list, tuple)):
        changed: Iterator[Any] = (_each_tensor(value, change) for value in output)
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
    return output
