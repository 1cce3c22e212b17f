"""Which expert serves whom: the routers' weights per task and layer, over real rows.

For every layer and task: the mean weight of each expert over all tokens of the task's rows (prompt and answer, padding
left out), its normalised entropy (1: all experts alike, 0: one has everything), and the mean entropy of the single
tokens' weights (how undecided the router is about one token). `distance` is the mean total variation between two
tasks' mean weights: 0 where all tasks use the experts alike, 1 where no two share any. Expert 1 of one layer has
nothing to do with expert 1 of another.

Shapes: B rows, L tokens, N experts, T tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.adapters.functional import gate_weights
from braidlora.analysis.batches import ROWS, Batch, task_batches
from braidlora.analysis.factors import LayerName
from braidlora.analysis.similarity import describe

if TYPE_CHECKING:
    from braidlora.adapters import MultiLoraLayer
    from braidlora.models.loading import Loaded

_NAME = "default"


def measure_routers(loaded: Loaded, rows: int = ROWS) -> dict[str, Any] | None:
    """The `routers` section of one model, see docs/analysis.md; None where it has no router.

    Args:
        loaded: a model with its adapter and tasks, in evaluation mode.
        rows: at most so many of each task, of its test rows where it has some.

    Raises:
        DataError: no task has rows.
    """
    layers = _routed_layers(loaded.model)
    if not layers:
        return None
    tasks = task_batches(loaded, rows, ("test", "validation", "train"))
    sums = {task.task: _watch(loaded.model, layers, task.batches) for task in tasks}
    names = [task.task for task in tasks]
    entries = []
    for name in layers:
        weights = torch.stack([sums[task][name].weights / sums[task][name].tokens for task in names])
        entries.append(
            {
                **describe(LayerName.of(name)),
                "weights": weights.tolist(),
                "entropy": _entropy(weights).tolist(),
                "token_entropy": [sums[task][name].entropy / sums[task][name].tokens for task in names],
                "serves": _serves(weights, names),
                "distance": _distance(weights),
            }
        )
    entries.sort(key=lambda entry: LayerName.of(entry["name"]).order)
    first = next(iter(layers))
    return {
        "tasks": names,
        "experts": layers[first].gate[_NAME].num_experts,
        "rows": {task.task: task.rows for task in tasks},
        "part": {task.task: task.part for task in tasks},
        "tokens": {task: sums[task][first].tokens for task in names},
        "mean": {
            "entropy": _over_layers(entries, "entropy"),
            "token_entropy": _over_layers(entries, "token_entropy"),
            "distance": None
            if len(names) < 2
            else sum(entry["distance"] for entry in entries) / len(entries),
            "layers_where_tasks_differ": sum(
                len([tasks for tasks in entry["serves"] if tasks]) > 1 for entry in entries
            ),
        },
        "layers": entries,
    }


class _Sums:
    """Over the tokens seen so far: weights (N,), entropies of single tokens, and their number."""

    def __init__(self, experts: int) -> None:
        self.weights = torch.zeros(experts, dtype=torch.float64)
        self.entropy = 0.0
        self.tokens = 0

    def add(self, w_TN: Tensor) -> None:
        w_TN = w_TN.double().cpu()
        self.weights += w_TN.sum(0)
        self.entropy += float(_entropy(w_TN).sum())
        self.tokens += len(w_TN)


def _routed_layers(model: Any) -> dict[str, MultiLoraLayer]:
    from braidlora.adapters import MultiLoraLayer, MultiLoraParameter

    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, MultiLoraLayer)
        # Adapters on a base's own experts have a router for each of them, which sees the tokens that the base sends.
        and not isinstance(module, MultiLoraParameter)
        and _NAME in module.braidlora_router
    }


def _watch(model: Any, layers: dict[str, MultiLoraLayer], batches: list[Batch]) -> dict[str, _Sums]:
    """Run the batches through the model and add up what every router says of their tokens."""
    sums = {name: _Sums(layer.gate[_NAME].num_experts) for name, layer in layers.items()}
    seen: list[Tensor] = []  # the attention mask of the batch at hand
    with _hooked(layers, sums, seen), torch.inference_mode():
        for batch in batches:
            seen[:] = [batch["attention_mask"].bool()]
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return sums


@contextmanager
def _hooked(layers: dict[str, MultiLoraLayer], sums: dict[str, _Sums], seen: list[Tensor]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def watch(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            x_BLk = inputs[0]
            # A pooled classifier head sees one vector per row, which no padding is part of.
            tokens = x_BLk[seen[0]] if x_BLk.shape[:-1] == seen[0].shape else x_BLk.flatten(0, -2)
            logits = F.linear(tokens, layer.braidlora_router[_NAME].weight.to(tokens.dtype))
            sums[name].add(gate_weights(logits, layer.gate[_NAME].temperature))

        return watch

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entropy(w_TN: Tensor) -> Tensor:
    """Of every row, over ln N: (T,)."""
    return -torch.special.xlogy(w_TN, w_TN).sum(-1) / math.log(w_TN.shape[-1])


def _serves(w_TN: Tensor, tasks: list[str]) -> list[list[str]]:
    """For every expert, the tasks that weigh it highest."""
    top = w_TN.argmax(-1).tolist()
    return [
        [task for task, expert in zip(tasks, top, strict=True) if expert == i] for i in range(w_TN.shape[-1])
    ]


def _distance(w_TN: Tensor) -> float | None:
    pairs = list(itertools.combinations(w_TN, 2))
    if not pairs:
        return None
    return float(sum((one - other).abs().sum() / 2 for one, other in pairs) / len(pairs))


def _over_layers(entries: list[dict[str, Any]], quantity: str) -> list[float]:
    columns = zip(*(entry[quantity] for entry in entries), strict=True)
    return [sum(column) / len(entries) for column in columns]
