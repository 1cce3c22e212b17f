"""The clients of a federation as its server knows them: names, ranks and counts of rows, and no rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from braidlora.config import FederatedConfig
from braidlora.errors import ConfigError
from braidlora.federated.protocol.seeds import derive_seed
from braidlora.federated.site.clients import Client, Clients
from braidlora.tasks import LabelSpace, Task


class CommonTest(NamedTuple):
    """A task of the common test, whose rows are at the sites."""

    name: str
    test: range


@dataclass(frozen=True)
class Roster(Clients):
    """`Clients` without rows.

    Args:
        rows: by client, what its site says of them. A site that has not connected yet is missing.
        bases: by client, the dtype and the quantization of its base model.
    """

    rows: Mapping[str, Any]
    bases: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """The content of `partition.json`; the digests of rows are keyed by a secret of each site."""
        return {
            name: {
                "rank": client.rank,
                "scaling": client.scaling,
                "seed": client.seed,
                "tasks": self.rows[name],
                **({"base": self.bases[name]} if name in self.bases else {}),
            }
            for name, client in self.by_name.items()
            if name in self.rows
        }

    def row_numbers(self) -> str:
        """Nothing: no data was divided."""
        return ""


def clients_of(config: FederatedConfig, sites: Collection[str] = ()) -> dict[str, Client]:
    """The clients of a recipe, without rows, by name in sorted order.

    Args:
        sites: those that the server knows; with `partition: {by: file}` each is a client, with its own file.

    Raises:
        ConfigError: the recipe divides one dataset among clients.
    """
    partition = config.federation.partition
    if partition is not None and (partition.by != "file" or not sites):
        raise ConfigError(
            "federation.partition: the server of a deployment does not see the data that would be divided. Name the "
            "clients in federation.clients, or give each site its own file with `by: file`."
        )
    sections = config.clients() if partition is None else config.clients_called(sorted(sites))
    clients = {}
    for section in sorted(sections or [], key=lambda one: one.name):
        derived = derive_seed(config.seed, "client", section.name)
        clients[section.name] = Client(
            name=section.name,
            rank=section.rank or config.adapter.r,
            scaling=config.scaling_of(section),
            seed=derived if section.seed is None else section.seed,
            tasks=[],
        )
    return clients


def make_roster(
    clients: dict[str, Client],
    rows: Mapping[str, Any],
    labels: Mapping[str, list[str]] | None,
    common: Mapping[str, int],
    bases: Mapping[str, Any],
) -> Roster:
    """The clients with what their sites say."""
    space = LabelSpace({name: list(one) for name, one in labels.items()}) if labels is not None else None
    tests = [CommonTest(name, range(count)) for name, count in common.items()]
    return Roster(clients, space, cast("list[Task]", tests), rows, bases)
