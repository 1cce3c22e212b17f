"""`braidlora preview` of a federated recipe: the rows of every client, and what the model will be trained on."""

from __future__ import annotations

from typing import Any

from braidlora.config import FederatedConfig
from braidlora.federated.site.clients import Clients, load_clients, with_rows
from braidlora.models.tokenizer import load_tokenizer
from braidlora.tasks import PARTS, Task
from braidlora.tasks.preview import preview


def federated_preview(config: FederatedConfig, rows: int = 2, as_json: bool = False) -> str | dict[str, Any]:
    """Load the rows of every client, and show a few of each task.

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
    return preview(config, tokenizer, rows, as_json, tasks=tasks_of_all(config, clients), clients=shown)


def tasks_of_all(config: FederatedConfig, clients: Clients) -> list[Task]:
    """Every task of the recipe with the rows of all clients; rows of a task that clients share are included once."""
    tasks = []
    for at, task in enumerate(next(iter(clients.by_name.values())).tasks):
        own = [client.tasks[at] for client in clients.by_name.values()]
        own = [one for one in own if one.train or one.test]
        if config.federation.partition is None:
            own = own[:1]
        rows = {part: [row for one in own for row in one.rows(part)] for part in PARTS}
        common = next((one for one in clients.common if one.name == task.name), None)
        tasks.append(common if common is not None and not own else with_rows(task, rows))
    return tasks
