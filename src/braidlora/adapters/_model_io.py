"""What the balance loss reads off a model's inputs and outputs: padding, the loss, this pass's share of a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_IGNORED = -100
_SHIFTED_LOSSES = ("ForCausalLM", "ForConditionalGeneration")  # transformers' names of next-token losses


def mask_of_tokens(mask: Tensor | None, leading: Sequence[int], device: torch.device) -> Tensor | None:
    """The mask (T,) of tokens of shape `leading`; None where the mask, flattened or not, has another shape."""
    if mask is None or tuple(leading) not in (tuple(mask.shape), (mask.numel(),)):
        return None
    return mask.reshape(-1).to(device)


def attention_mask(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """True for the tokens of a batch (B, L) that are not padding; None where that is not known.

    An encoder-decoder has two kinds of tokens, which cannot always be distinguished by shape.
    """
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        names = list(inspect.signature(model.forward).parameters)[: len(args)]
        mask = args[names.index("attention_mask")] if "attention_mask" in names else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return None if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else mask != 0


def share_of_step(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """This pass's share of the tokens of an optimizer step, where the loss is divided by all tokens of the step.

    transformers' Trainer passes their number as `num_items_in_batch`; it counts targets as done here.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs.get("labels")
        config = getattr(model, "config", None)
        shifted = getattr(model, "loss_type", None) in _SHIFTED_LOSSES
        if isinstance(labels, Tensor) and shifted and not getattr(config, "is_encoder_decoder", False):
            labels = labels[..., 1:]
    if items is None or not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return None  # losses of full sequences are means, whatever that number is
    targets = labels.ne(_IGNORED).sum()
    return targets / (items.to(targets.device).reshape(-1)[0] if isinstance(items, Tensor) else items)


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output: by its name, or the only or first tensor, if that is a scalar."""
    if isinstance(output, dict):
        loss = output.get("loss")
    elif isinstance(output, (list, tuple)) and not hasattr(output, "loss"):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", output)
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point() else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """The output with its loss replaced."""
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


def with_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with every floating-point tensor in it changed; caches and other objects are kept."""
    if isinstance(output, Tensor):
        return change(output) if output.is_floating_point() else output
    if isinstance(output, dict):
        for key, value in list(output.items()):
            output[key] = with_tensors(value, change)
        return output
    if isinstance(output, (list, tuple)):
        changed: Iterator[Any] = (with_tensors(value, change) for value in output)
        return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
    return output
