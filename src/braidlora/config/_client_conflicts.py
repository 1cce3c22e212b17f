"""Conflicts in who the clients of a federation are: their tasks, a partition, ranks and scalings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from braidlora.config._federation import PartitionSection
from braidlora.federated.protocol.rules import rules_where, spec_of

if TYPE_CHECKING:
    from braidlora.config._conflicts import Problem
    from braidlora.config._federated import FederatedConfig


def clients_and_tasks(config: FederatedConfig) -> Iterator[Problem]:
    """Clients without tasks or rows, tasks without clients, and settings of the partition."""
    federation = config.federation
    if federation.clients is not None and federation.partition is not None:
        yield "federation.partition", "`clients` and `partition` are both given; keep one of them"
        return
    known = [task.name for task in config.tasks]
    trained = [task.name for task in config.tasks if task.train]
    used = set(federation.common_test)
    if federation.clients is not None:
        names = [client.name.lower() for client in federation.clients]
        if twice := sorted(name for name, times in Counter(names).items() if times > 1):
            yield "federation.clients", f"duplicate client names: {', '.join(twice)}"
        for index, client in enumerate(federation.clients):
            key = f"federation.clients.{index}.tasks"
            used.update(client.tasks)
            if unknown := sorted(set(client.tasks) - set(known)):
                yield key, f"unknown task {', '.join(unknown)}; the tasks are {', '.join(known)}"
            elif not set(client.tasks) & set(trained):
                yield key, f"none of {', '.join(client.tasks)} has training rows"
    if federation.partition is not None:
        task, listed = federation.partition.task, f"tasks with training rows: {', '.join(trained) or 'none'}"
        if task is not None and task not in trained:
            yield "federation.partition.task", f"{task} is not a task with training rows; {listed}"
        elif task is None and len(trained) != 1:
            yield "federation.partition.task", f"name the task to divide; {listed}"
        else:
            used.add(config.divided_task())
        yield from _partition(federation.partition)
    elif federation.clients is None:
        used.update(trained)
    if unknown := sorted(set(federation.common_test) - set(known)):
        yield "federation.common_test", f"unknown task {', '.join(unknown)}; the tasks are {', '.join(known)}"
    if unused := [name for name in known if name not in used]:
        yield (
            "tasks",
            f"no client has {', '.join(unused)}. Assign it to a client, list it in common_test, or remove it",
        )


def _partition(partition: PartitionSection) -> Iterator[Problem]:
    key, by = "federation.partition", partition.by
    counted = by in ("iid", "dirichlet")
    if counted and partition.clients is None:
        yield f"{key}.clients", f"`by: {by}` needs a number of clients"
    if not counted and partition.clients is not None:
        yield f"{key}.clients", f"`by: {by}` creates one client per {by}. Remove it"
    if by == "column" and partition.column is None:
        yield f"{key}.column", "`by: column` needs the name of a column"
    if by in ("iid", "file") and partition.column is not None:
        yield f"{key}.column", f"`by: {by}` does not use a column. Remove it"
    if by == "file" and partition.is_given("min_rows"):
        yield f"{key}.min_rows", "`by: file` uses every file unchanged. Remove it"
    if not counted and partition.is_given("seed"):
        yield f"{key}.seed", f"`by: {by}` draws nothing at random. Remove it"
    if by != "dirichlet" and partition.is_given("alpha"):
        yield f"{key}.alpha", f"applies to `by: dirichlet`, not to {by}. Remove it"


def ranks_and_scalings(config: FederatedConfig, clients: int | None) -> Iterator[Problem]:
    """Ranks that do not match the clients, and ranks or scalings that the rule does not allow."""
    federation = config.federation
    listed = federation.clients or []
    counted = True
    if federation.ranks is not None and any(client.rank for client in listed):
        yield "federation.ranks", "clients have their own ranks as well; keep one of the two"
        counted = False
    elif federation.ranks is not None and clients is not None and len(federation.ranks) != clients:
        yield "federation.ranks", f"{len(federation.ranks)} ranks for {clients} clients; give one for each"
        counted = False
    ranks = set(federation.ranks or [client.rank or config.adapter.r for client in listed])
    spec = spec_of(federation.rule)
    if spec.ranks == "equal" and len(ranks) > 1:
        yield (
            "federation.ranks" if federation.ranks else "federation.clients",
            f"rule {spec.name} needs one rank for all clients, got {', '.join(map(str, sorted(ranks)))}; "
            f"{rules_where(lambda one: one.ranks == 'any')} allow different ranks",
        )
        counted = False
    if spec.one_scaling and any(client.alpha for client in listed) and counted:
        scalings = {client.name: round(config.scaling_of(client), 9) for client in config.with_ranks(listed)}
        if len(set(scalings.values())) > 1:
            given = ", ".join(f"{name} {value:g}" for name, value in scalings.items())
            yield (
                "federation.clients",
                f"rule {spec.name} averages factors, which needs one scaling alpha / rank, got {given}. Remove "
                "alpha: it then follows from the rank",
            )
