"""The federated recipe, which `federate` and `plan` read: a train recipe and the section `federation`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, model_validator

from braidlora.adapters.sharing import lora_scaling
from braidlora.config._conflicts import ConflictError, conflicts, count_conflicts
from braidlora.config._federation import (
    ClientAdapterSection,
    ClientSection,
    ClientTrainingSection,
    FederationSection,
)
from braidlora.config._names import name_problem, same_file
from braidlora.config._schema import RunConfig
from braidlora.errors import ConfigError


class FederatedConfig(RunConfig):
    """A federated recipe: the sections of a train recipe, and `federation`."""

    adapter: ClientAdapterSection = ClientAdapterSection()
    training: ClientTrainingSection = ClientTrainingSection()
    federation: FederationSection = FederationSection()
    output: str = Field("runs/federation", description="the run directory")

    @model_validator(mode="after")
    def _federation_agrees(self) -> FederatedConfig:
        if problems := conflicts(self):
            raise ConflictError(problems)
        return self

    def clients(self) -> list[ClientSection] | None:
        """The clients, with rank and alpha filled in; None if they depend on the data (a partition by column or file).

        The clients of another partition are `client-1`, `client-2`, … (`client-01` if there are ten or more).
        """
        federation = self.federation
        if federation.clients is not None:
            return self.with_ranks(federation.clients)
        if federation.partition is None:
            return self.with_ranks(
                [ClientSection(name=task.name, tasks=[task.name]) for task in self.tasks if task.train]
            )
        count = federation.partition.clients
        if count is None:
            return None
        return self.clients_called([f"client-{n:0{len(str(count))}}" for n in range(1, count + 1)])

    def clients_called(self, names: Sequence[str]) -> list[ClientSection]:
        """The clients of a partition, given their names.

        Raises:
            ConfigError: a name is invalid, or ranks, sampling or a robust aggregator do not fit the number of clients.
        """
        if problems := count_conflicts(self, len(names)):
            raise ConfigError(
                f"the partition gives {len(names)} clients ({', '.join(names[:8])}{', …' if names[8:] else ''}):\n"
                + "\n".join(f"  {key}: {text}." for key, text in problems)
            )
        for name in names:
            if problem := name_problem(name):
                raise ConfigError(f"federation.partition: the name of a client, {problem}.")
        if same := same_file(names):
            raise ConfigError(
                f"federation.partition: client names must differ in more than case: {', '.join(same)}."
            )
        task = self.divided_task()
        return self.with_ranks([ClientSection(name=name, tasks=[task]) for name in names])

    def with_ranks(self, clients: list[ClientSection]) -> list[ClientSection]:
        """`clients` with missing ranks and alphas filled in."""
        ranks = self.federation.ranks or [self.adapter.r] * len(clients)
        filled = []
        for client, rank in zip(clients, ranks, strict=True):
            rank = client.rank or rank
            alpha = client.alpha or self.scaling * (math.sqrt(rank) if self.adapter.use_rslora else rank)
            filled.append(client.model_copy(update={"rank": rank, "alpha": alpha}))
        return filled

    def divided_task(self) -> str:
        """The task that `partition` divides: the named one, or the only one with training rows."""
        assert self.federation.partition is not None
        named = self.federation.partition.task
        return named or next(task.name for task in self.tasks if task.train)

    @property
    def scaling(self) -> float:
        """s = alpha / r (alpha / √r with `use_rslora`) of every client without its own alpha."""
        return lora_scaling(self.adapter.lora_alpha, self.adapter.r, self.adapter.use_rslora)

    def scaling_of(self, client: ClientSection) -> float:
        """The scaling of a client returned by `clients` or `with_ranks`."""
        assert client.rank is not None
        assert client.alpha is not None
        return lora_scaling(client.alpha, client.rank, self.adapter.use_rslora)

    def sampled_per_round(self, clients: int) -> int:
        """How many of the clients are sampled in a round."""
        sample = self.federation.sample
        if sample is None:
            return clients
        return sample.number or max(1, round((sample.fraction or 1.0) * clients))
