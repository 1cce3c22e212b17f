"""Which expert serves which task: the routers' weights per task and layer, over real rows.

For every layer and task: the mean weight of each expert over all tokens of the task's rows (prompt and answer, without
padding), its normalized entropy (1: all experts alike, 0: one has all the weight), and the mean entropy of the weights
of single tokens (how undecided the router is about one token). `distance` is the mean total variation between two
tasks' mean weights: 0 if all tasks use the experts alike, 1 if no two share any. Expert 1 of one layer is unrelated to
expert 1 of another.

Shapes: N experts, T tasks.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from braidlora.adapters import for_tasks
from braidlora.adapters.router_means import entropy, router_means
from braidlora.analysis.batches import ROWS, task_batches
from braidlora.analysis.factors import LayerName
from braidlora.analysis.similarity import describe

if TYPE_CHECKING:
    from braidlora.models.loading import Loaded


def measure_routers(loaded: Loaded, rows: int = ROWS) -> dict[str, Any] | None:
    """The `routers` section of one model, see docs/reference/analysis.md; None if it has no router.

    Routers of the base's own stacked experts are left out: each has its own router, which sees only the tokens that
    the base sends to that expert.

    Args:
        loaded: a model with its adapter and tasks, in evaluation mode.
        rows: at most this many of each task, of its test rows if it has some.

    Raises:
        DataError: no task has rows.
        ConfigError: the adapter was not trained on one of the tasks, and needs to know them.
    """
    if not any(getattr(module, "braidlora_router", None) for module in loaded.model.modules()):
        return None
    tasks = task_batches(loaded, rows, ("test", "validation", "train"))
    found = {}
    for task in tasks:
        with for_tasks(task.task):
            found[task.task] = router_means(loaded.model, task.batches)[0]
    names = list(found)
    layers = [name for name, mean in found[names[0]].items() if mean.weights.dim() == 1]
    if not layers:
        return None
    entries = []
    for name in sorted(layers, key=lambda name: LayerName.of(name).order):
        means = [found[task][name] for task in names]
        weights = torch.stack([mean.weights for mean in means])
        entries.append(
            {
                **describe(LayerName.of(name)),
                "weights": weights.tolist(),
                "entropy": entropy(weights).tolist(),
                "token_entropy": [mean.token_entropy for mean in means],
                "serves": _serves(weights, names),
                "distance": _distance(weights),
            }
        )
    distances = [entry["distance"] for entry in entries]
    return {
        "tasks": names,
        "experts": len(entries[0]["weights"][0]),
        "rows": {task.task: task.rows for task in tasks},
        "part": {task.task: task.part for task in tasks},
        "tokens": {task: found[task][layers[0]].tokens for task in names},
        "mean": {
            "entropy": _over_layers(entries, "entropy"),
            "token_entropy": _over_layers(entries, "token_entropy"),
            "distance": sum(distances) / len(entries) if len(names) > 1 else None,
            "layers_where_tasks_differ": sum(
                len([tasks for tasks in entry["serves"] if tasks]) > 1 for entry in entries
            ),
        },
        "layers": entries,
    }


def _serves(w_TN: Tensor, tasks: list[str]) -> list[list[str]]:
    """For every expert, the tasks that give it the highest weight."""
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
