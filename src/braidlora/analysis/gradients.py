"""Do tasks, or clients, pull a factor in the same direction? Cosines between their gradients, and the norms.

The gradient of a task is that of its mean loss per target over a few rows, without dropout, at the current weights.
The diagonal of the matrix of cosines between tasks has the cosine between the gradients of the two halves of one
task's rows: how far so few rows agree with each other, and so the most that can be expected of two tasks.

While B is zero, A's gradient is zero, and its cosines are null with that reason. T is the number of tasks.

In a federation, clients take the place of tasks: each with its own rows and its model after the last round.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from braidlora.adapters import for_tasks
from braidlora.adapters.sharing import SCHEMES
from braidlora.analysis.batches import ROWS, Batch, TaskBatches, task_batches
from braidlora.analysis.factors import LayerName
from braidlora.analysis.similarity import Matrix, describe, off_diagonal
from braidlora.config import FederatedConfig, load_config
from braidlora.errors import ConfigError, DataError
from braidlora.federated.protocol.factors import AXES, split
from braidlora.federated.protocol.rules import spec_of
from braidlora.federated.simulation.final import final_models, fixed_keys, last_round
from braidlora.models.loading import Loaded
from braidlora.runs import FederatedDirectory
from braidlora.tasks.class_weights import class_weights
from braidlora.training.loss import Losses

# A tensor's name in an adapter's file: without the adapter's own.
_TENSOR = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?:lora|braidlora|factoredlora)_(?P<factor>A|B|M|B1|B2|base|router)\.weight"
)
_ORDER = ("A", "M", "B1", "B2", "base", "B", "router")
Gradients = dict[str, Tensor]


def measure_gradients(loaded: Loaded, rows: int = ROWS) -> dict[str, Any]:
    """The `gradients` section of one model, see docs/reference/analysis.md.

    Args:
        loaded: a model with its adapter and tasks.
        rows: at most this many of each task's training rows.

    Raises:
        DataError: fewer than two tasks have training rows, or a task has only one row.
    """
    tasks = task_batches(loaded, rows, ("train",))
    if len(tasks) < 2:
        raise DataError(f"conflict needs two tasks with training rows; only {tasks[0].task} has some.")
    for task in tasks:
        if not task.halves[1]:
            raise DataError(
                f"task {task.task}: one row cannot be split in half; use --rows-per-task=2 or more."
            )
    parameters = adapter_factors(loaded.model)
    halves = {task.task: _of_tasks(loaded, parameters, [task]) for task in tasks}
    shared = _shared(loaded.model, sorted({_match(name)["factor"] for name in parameters}, key=_ORDER.index))
    return _section("task", {task.task: task.rows for task in tasks}, halves, shared)


def measure_client_gradients(
    directory: FederatedDirectory, rows: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """The `gradients` section of a finished federation, with clients in place of tasks; `shared` is what is sent down.

    Factors that are redrawn in each round are left out, and those whose shapes differ between clients: cosines between
    their gradients would be meaningless.

    Args:
        directory: of the federation.
        rows: at most this many training rows of each of a client's tasks.
        overrides: `dotted.key=value` for the federation's recipe.

    Raises:
        ConfigError: nothing of this federation can be compared, or an override contradicts what it was run with.
        DataError: the rows are not the federation's, or fewer than two clients have two rows.
        CheckpointError: it is not finished, its last round is damaged or missing, or the base is another one.
    """
    _check_comparable(directory, overrides)
    halves: dict[str, tuple[Gradients, Gradients]] = {}
    counted = {}
    shared: list[str] = []
    left_out = []
    for client, host in final_models(directory, overrides):
        loaded = Loaded(host.model.eval(), host.tokenizer, host.config, client.tasks, host.label_space)
        tasks = task_batches(loaded, rows, ("train",))
        if not any(task.halves[1] for task in tasks):
            left_out.append(client.name)
            continue
        parameters = {
            name: slot
            for name, slot in host.parameters().items()
            if _TENSOR.fullmatch(name) and split(name)[1] not in host.rule.spec.restarts
        }
        halves[client.name] = _of_tasks(loaded, parameters, tasks)
        counted[client.name] = sum(task.rows for task in tasks)
        shared = [factor.partition("_")[2] for factor in host.rule.spec.downloads]
    if left_out:
        warnings.warn(
            f"a single row cannot be split in half, so these clients are excluded: {', '.join(left_out)}",
            stacklevel=2,
        )
    if len(halves) < 2:
        raise DataError(
            f"{directory.path}: conflict needs two clients with two or more rows; use --rows-per-task=2 or more."
        )
    return _section("client", counted, halves, shared)


def _check_comparable(directory: FederatedDirectory, overrides: Sequence[str]) -> None:
    """Checks that do not need the base, which may take minutes to load."""
    last_round(directory)
    content = directory.read(directory.config.name)
    spec = spec_of(load_config(directory.config, [], FederatedConfig, content=content).federation.rule)
    lasting = [factor for factor in spec.factors if factor not in spec.restarts]
    ranks = [client["rank"] for client in directory.read_json(directory.partition.name).values()]
    problems = []
    if given := fixed_keys(overrides):
        problems.append(f"--{given[0]}: the federation was run with its own settings; leave it out")
    if len(ranks) < 2:
        problems.append(f"{directory.path}: has one client; conflict needs two")
    if not lasting:
        problems.append(
            f"{directory.path}: under {spec.name} clients start a new A and B of their own in each round, so there is "
            "no factor whose gradients could be compared"
        )
    elif len(set(ranks)) > 1 and all("r" in AXES[factor] for factor in lasting):
        problems.append(
            f"{directory.path}: clients of ranks {', '.join(map(str, sorted(set(ranks))))} have factors of different "
            "shapes, whose gradients have no cosine"
        )
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def _section(
    of: str, rows: dict[str, int], halves: dict[str, tuple[Gradients, Gradients]], shared: list[str]
) -> dict[str, Any]:
    """The section, from the gradients of both halves of the rows of every task (or client)."""
    own = list(halves.values())
    names = [name for name in own[0][0] if len({first[name].shape for first, _ in own}) == 1]
    products = {name: inner_products(name, own) for name in names}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(_match(name)["factor"], []).append(name)
    return {
        "of": of,
        "tasks": list(halves),
        "rows": rows,
        "dropout": "off",
        "shared": shared,
        "factors": {
            factor: {
                **compare_gradients([products[name] for name in of_factor]),
                "layers": [
                    {**describe(_layer(name)), **compare_gradients([products[name]])}
                    for name in sorted(of_factor, key=lambda name: _layer(name).order)
                ],
            }
            for factor, of_factor in sorted(members.items(), key=lambda item: _ORDER.index(item[0]))
        },
    }


def inner_products(name: str, halves: list[tuple[Gradients, Gradients]]) -> Tensor:
    """Between the gradients for one parameter, (2, 2, T, T) in float64; those of several parameters add up.

    Entry [i, j, t, u] is that of half i of t's rows with half j of u's.
    """
    parts = [torch.stack([pair[at][name].flatten() for pair in halves]).double() for at in (0, 1)]
    return torch.stack([torch.stack([one @ other.T for other in parts]) for one in parts])


def _match(name: str) -> re.Match[str]:
    match = _TENSOR.fullmatch(name)
    assert match is not None
    return match


def name_parts(name: str) -> tuple[str, str]:
    """The layer and the factor that a tensor's name in an adapter's file says."""
    match = _match(name)
    return match["layer"], match["factor"]


def _layer(name: str) -> LayerName:
    return LayerName.of(_match(name)["layer"])


def adapter_factors(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's matrices by their names in its file; heads that are also trained are left out."""
    plain = {
        name.removesuffix(".default.weight") + ".weight": parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".default.weight")
    }
    return {name: parameter for name, parameter in plain.items() if _TENSOR.fullmatch(name)}


def _shared(model: Any, factors: list[str]) -> list[str]:
    """The factors that all tasks share; the others are split over experts, or belong to the router."""
    config = model.peft_config[model.active_adapter].to_dict()
    if config["peft_type"] != "BRAIDLORA" or config["num_experts"] == 1:
        return factors
    return [factor for factor in factors if factor in SCHEMES[config["share"]].shared]


def _of_tasks(
    loaded: Loaded, parameters: dict[str, torch.nn.Parameter], tasks: list[TaskBatches]
) -> tuple[Gradients, Gradients]:
    """The summed gradients of both halves divided by the number of targets: their sum is the gradient of the mean loss.

    Args:
        tasks: one, or all of a client's, treated as one.
    """
    model = loaded.model
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    found, targets = [], 0.0
    try:
        for at in (0, 1):
            model.zero_grad(set_to_none=True)
            for task in tasks:
                with for_tasks(task.task):
                    targets += sum(_backward(loaded, batch) for batch in task.halves[at])
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
    weights = class_weights(loaded.config, loaded.tasks, loaded.label_space)
    losses = Losses(outputs.logits, batch["labels"], batch["task_id"], loaded.label_space, weights)
    losses.values.sum().backward()
    return float(losses.counted.sum())


def compare_gradients(products: list[Tensor]) -> dict[str, Any]:
    """Cosines and norms over several parameters taken together.

    Args:
        products: of each parameter, see `inner_products`.

    Returns:
        `cosine`, `norm`, `between`, `within` and `signs`, see docs/reference/analysis.md; `reason` if all are zero.
    """
    by_half = torch.stack(products).sum(0)
    gram = by_half.sum((0, 1))
    norms, half_norms = gram.diagonal().sqrt(), by_half.diagonal(dim1=2, dim2=3)
    cosines = gram / torch.outer(norms, norms)
    own = by_half[0, 1].diagonal() / (half_norms[0, 0] * half_norms[1, 1]).sqrt()
    cosines.diagonal().copy_(own)
    signs = by_half.nan_to_num().sign().sum((0, 1)).long()
    signs.diagonal().copy_(by_half[0, 1].nan_to_num().diagonal().sign() * 4)
    cosine: Matrix = [[value if math.isfinite(value) else None for value in row] for row in cosines.tolist()]
    within = [value for i, row in enumerate(cosine) if (value := row[i]) is not None]
    entry: dict[str, Any] = {
        "cosine": cosine,
        "norm": norms.tolist(),
        "between": off_diagonal(cosine),
        "within": sum(within) / len(within) if within else None,
        "signs": signs.tolist(),
    }
    if not bool(norms.any()):
        entry["reason"] = "every task's gradient is zero here, because the other factor is zero"
    return entry
