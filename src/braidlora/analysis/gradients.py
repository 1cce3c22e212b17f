"""Do the tasks pull a factor the same way: cosines between their gradients, and the gradients' norms.

The gradient of a task is that of its mean loss per target over the same few rows, dropout off, at the weights as they
stand. Beside the cosines between tasks stands, on the diagonal, the cosine between the gradients of the two halves of
one task's rows: what so few rows agree upon among themselves, and so the most that two tasks can be expected to.

While B is zero, A's gradient is zero, and its cosines are null with that reason. T is the number of tasks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from braidlora.analysis.batches import ROWS, Batch, TaskBatches, task_batches
from braidlora.analysis.factors import LayerName
from braidlora.analysis.similarity import Matrix, describe, off_diagonal
from braidlora.errors import DataError
from braidlora.training.loss import Losses

if TYPE_CHECKING:
    from braidlora.evaluation.loading import Loaded

_PARAMETER = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?:lora|braidlora|factoredlora)_(?P<factor>A|B|M|B1|B2|router)\.default\.weight"
)
_ORDER = ("A", "M", "B1", "B2", "B", "router")
Gradients = dict[str, Tensor]


def measure_gradients(loaded: Loaded, rows: int = ROWS) -> dict[str, Any]:
    """The `gradients` section of one model, see docs/analysis.md.

    Args:
        loaded: a model with its adapter and tasks.
        rows: at most so many of each task's training rows.

    Raises:
        DataError: fewer than two tasks have training rows, or a task has one row only.
    """
    tasks = task_batches(loaded, rows, ("train",))
    names = [task.task for task in tasks]
    if len(tasks) < 2:
        raise DataError(f"conflict needs two tasks with training rows; there is {names[0]} alone.")
    for task in tasks:
        if not task.halves[1]:
            raise DataError(f"task {task.task}: one row cannot be halved; use --rows=2 or more.")
    parameters = _factors(loaded.model)
    halves = [_of_task(loaded, parameters, task) for task in tasks]
    products = {name: _Products.of(name, halves) for name in parameters}
    members: dict[str, list[str]] = {}
    for name in parameters:
        members.setdefault(_match(name)["factor"], []).append(name)
    return {
        "tasks": names,
        "rows": {task.task: task.rows for task in tasks},
        "dropout": "off",
        "shared": _shared(loaded.model, list(members)),
        "factors": {
            factor: {
                **_compare([products[name] for name in of_factor]),
                "layers": [
                    {**describe(_layer(name)), **_compare([products[name]])}
                    for name in sorted(of_factor, key=lambda name: _layer(name).order)
                ],
            }
            for factor, of_factor in sorted(members.items(), key=lambda item: _ORDER.index(item[0]))
        },
    }


@dataclass(frozen=True)
class _Products:
    """Inner products of the gradients for one parameter, float64; those of several parameters add up.

    Attributes:
        tasks: (T, T) between the gradients of all tasks.
        halves: (T, 3) of the first half of a task's rows with the second, and of either with itself.
    """

    tasks: Tensor
    halves: Tensor

    @classmethod
    def of(cls, name: str, halves: list[tuple[Gradients, Gradients]]) -> _Products:
        first, second = (torch.stack([pair[at][name].flatten() for pair in halves]).double() for at in (0, 1))
        whole = first + second
        own = [(first * second).sum(1), first.square().sum(1), second.square().sum(1)]
        return cls(whole @ whole.T, torch.stack(own, 1))


def _match(name: str) -> re.Match[str]:
    match = _PARAMETER.fullmatch(name)
    assert match is not None
    return match


def _layer(name: str) -> LayerName:
    return LayerName.of(_match(name)["layer"])


def _factors(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's own matrices by parameter name, by factor and layer; heads trained beside them are left out."""
    return {name: parameter for name, parameter in model.named_parameters() if _PARAMETER.fullmatch(name)}


def _shared(model: Any, factors: list[str]) -> list[str]:
    """The factors that all tasks train in common; the others are split over experts, or the router's."""
    config = model.peft_config[model.active_adapter].to_dict()
    if config["peft_type"] != "BRAIDLORA" or config["num_experts"] == 1:
        return factors
    return [factor for factor in factors if factor == config["share"]]


def _of_task(
    loaded: Loaded, parameters: dict[str, torch.nn.Parameter], task: TaskBatches
) -> tuple[Gradients, Gradients]:
    """The summed gradients of both halves over the task's number of targets: their sum is the task's gradient."""
    model = loaded.model
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    found, targets = [], 0.0
    try:
        for half in task.halves:
            model.zero_grad(set_to_none=True)
            for batch in half:
                targets += _backward(loaded, batch)
            found.append(
                {
                    name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()
                    for name, parameter in parameters.items()
                }
            )
    finally:
        model.zero_grad(set_to_none=True)
        for parameter in frozen:
            parameter.requires_grad_(False)
    first, second = ({name: grad.cpu() / targets for name, grad in half.items()} for half in found)
    return first, second


def _backward(loaded: Loaded, batch: Batch) -> float:
    """Add the gradient of the batch's summed loss; returns its number of targets."""
    outputs = loaded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    losses = Losses(outputs.logits, batch["labels"], batch["task_id"], loaded.label_space)
    losses.values.sum().backward()
    return float(losses.counted.sum())


def _compare(products: list[_Products]) -> dict[str, Any]:
    """Cosines and norms over several parameters taken together."""
    gram = torch.stack([product.tasks for product in products]).sum(0)
    halves = torch.stack([product.halves for product in products]).sum(0)
    norms = gram.diagonal().sqrt()
    cosines = gram / torch.outer(norms, norms)
    cosines.diagonal().copy_(halves[:, 0] / (halves[:, 1] * halves[:, 2]).sqrt())
    cosine: Matrix = [[value if math.isfinite(value) else None for value in row] for row in cosines.tolist()]
    within = [value for i, row in enumerate(cosine) if (value := row[i]) is not None]
    entry: dict[str, Any] = {
        "cosine": cosine,
        "norm": norms.tolist(),
        "between": off_diagonal(cosine),
        "within": sum(within) / len(within) if within else None,
    }
    if not bool(norms.any()):
        entry["reason"] = "every task's gradient is zero here: the factor it is multiplied with is zero"
    return entry
