"""The federated recipe, which `federate` and `plan` read: a train recipe, and who the clients are."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from braidlora.config._contradictions import Contradictions, contradictions
from braidlora.config._federation import ClientAdapterSection, ClientSection, FederationSection
from braidlora.config._schema import RunConfig


class FederatedConfig(RunConfig):
    """A whole federated recipe: the sections of a train recipe, and `federation`."""

    adapter: ClientAdapterSection = ClientAdapterSection()
    federation: FederationSection = FederationSection()
    output: str = Field("runs/federation", description="the run directory")

    @model_validator(mode="after")
    def _federation_agrees(self) -> FederatedConfig:
        if problems := contradictions(self):
            raise Contradictions(problems)
        return self

    def clients(self) -> list[ClientSection] | None:
        """The clients with rank and alpha filled in, as far as the recipe alone tells.

        Clients of a partition are `client-1` … in their order (`client-01` where there are ten or more). None where
        only the data tell: a partition by column or file.
        """
        federation = self.federation
        if federation.clients is not None:
            listed = federation.clients
        elif federation.partition is not None:
            count = federation.partition.clients
            if count is None:
                return None
            task = self.divided_task()
            listed = [
                ClientSection(name=f"client-{number:0{len(str(count))}}", tasks=[task])
                for number in range(1, count + 1)
            ]
        else:
            listed = [ClientSection(name=task.name, tasks=[task.name]) for task in self.tasks if task.train]
        return self.with_ranks(listed)

    def with_ranks(self, clients: list[ClientSection]) -> list[ClientSection]:
        """`clients` with the rank and the alpha that they have not given."""
        ranks = self.federation.ranks or [self.adapter.r] * len(clients)
        filled = []
        for client, rank in zip(clients, ranks, strict=True):
            rank = client.rank or rank
            alpha = client.alpha or self.scaling * (math.sqrt(rank) if self.adapter.use_rslora else rank)
            filled.append(client.model_copy(update={"rank": rank, "alpha": alpha}))
        return filled

    def divided_task(self) -> str:
        """The task that `partition` speaks of: the named one, or the only one with training rows."""
        assert self.federation.partition is not None
        named = self.federation.partition.task
        return named or next(task.name for task in self.tasks if task.train)

    @property
    def scaling(self) -> float:
        """s = alpha / r (alpha / √r with `use_rslora`), for every client that gives no alpha of its own."""
        adapter = self.adapter
        return adapter.lora_alpha / (math.sqrt(adapter.r) if adapter.use_rslora else adapter.r)

    def scaling_of(self, client: ClientSection) -> float:
        """The scaling of a client that `clients` or `with_ranks` gave."""
        assert client.rank is not None
        assert client.alpha is not None
        return client.alpha / (math.sqrt(client.rank) if self.adapter.use_rslora else client.rank)

    def asked_per_round(self, clients: int) -> int:
        """How many of so many clients are asked in a round."""
        sample = self.federation.sample
        if sample is None:
            return clients
        return sample.number or max(1, round((sample.fraction or 1.0) * clients))
