"""Losses, gradients and weights that are not finite: a run stops at that step, before it changes a weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from braidlora.errors import TrainingError

_SHOWN = 3


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A bool on the device: whether every element of every tensor is finite. Does not wait for the device."""
    norm = torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors], norm_type=float("inf"))
    return torch.isfinite(norm)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def refuse_weights(model: nn.Module, step: int) -> None:
    """Raise TrainingError if a trainable weight is not finite."""
    parameters = trainable(model)
    if not bool(all_finite(parameter for _, parameter in parameters)):
        raise TrainingError(f"step {step}: {_named('weight', parameters)} after the optimizer step. {REMEDY}")


def diagnose(model: nn.Module, losses: list[Tensor], step: int, rows: list[str]) -> TrainingError:
    """The error for a step whose loss or gradient is not finite, with the first cause found and its rows.

    Args:
        model: holds the gradients of the step.
        losses: one per accumulated batch.
        step: the step that was not made, counted from 1.
        rows: a description of each accumulated batch's rows.
    """
    with torch.no_grad():
        weights = [(name, p) for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        gradients = [(name, p.grad) for name, p in trainable(model) if p.grad is not None]
    broken = [index for index, loss in enumerate(losses) if not bool(torch.isfinite(loss))]
    batch = "; ".join(rows[index] for index in broken) if broken else "; ".join(rows)
    if weights:
        what = _named("weight", weights) + " before it"
    elif broken:
        what = f"the loss is {losses[broken[0]].item()}"
    else:
        what = _named("gradient", gradients)
    return TrainingError(f"step {step}: {what}. Batch: {batch}. The step was not taken. {REMEDY}")


REMEDY = (
    "The last checkpoint is intact. Lower training.learning_rate, keep training.max_grad_norm above 0, use bfloat16 "
    "instead of float16, or look at these rows."
)


def _named(what: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    broken = [(name, tensor) for name, tensor in tensors if not bool(torch.isfinite(tensor).all())]
    if not broken:
        return f"the norm of the {what}s overflows"
    first = broken[0][1]
    kind = "NaN" if bool(torch.isnan(first).any()) else "Inf"
    names = ", ".join(name for name, _ in broken[:_SHOWN])
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    return f"{kind} in the {what} of {names}{more}"
