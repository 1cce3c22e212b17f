"""`braidlora preview` of a federated recipe: who has which rows, and the rows as the model will see them."""

from __future__ import annotations

import dataclasses
from typing import Any

from braidlora.config import FederatedConfig
from braidlora.federated.site.clients import Clients, load_clients
from braidlora.models.tokenizer import load_tokenizer
from braidlora.tasks import PARTS, Task
from braidlora.tasks.preview import preview


def federated_preview(config: FederatedConfig, rows: int = 2, as_json: bool = False) -> str | dict[str, Any]:
    """Load every client's rows, and show a few of each task. The base model itself is not loaded.

    Args, returns and raises as `braidlora.tasks.preview.preview`, with `clients` in the dictionary.
    """
    clients = load_clients(config)
    shown = {
        name: {
            "rank": client.rank,
            "rows": {
                task.name: {part: len(task.rows(part)) for part in PARTS if task.rows(part)}
                for task in client.own_tasks()
            },
        }
        for name, client in clients.by_name.items()
    }
    tokenizer = load_tokenizer(config.model)
    return preview(config, tokenizer, rows, as_json, tasks=_tasks(config, clients), clients=shown)


def _tasks(config: FederatedConfig, clients: Clients) -> list[Task]:
    """Every task of the recipe with all rows that some client has; where clients share a task, its rows once."""
    tasks = []
    for at, task in enumerate(next(iter(clients.by_name.values())).tasks):
        own = [client.tasks[at] for client in clients.by_name.values()]
        own = [one for one in own if one.train or one.test]
        if config.federation.partition is None:
            own = own[:1]
        rows = {part: [row for one in own for row in one.rows(part)] for part in PARTS}
        common = next((one for one in clients.common if one.name == task.name), None)
        tasks.append(
            common
            if common is not None and not own
            else dataclasses.replace(
                task, train=rows["train"], validation=rows["validation"], test=rows["test"]
            )
        )
    return tasks
