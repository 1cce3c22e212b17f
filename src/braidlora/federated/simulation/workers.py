"""Clients' jobs in several processes, each with its own base model. The replies have the bytes of a single process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from braidlora.config import FederatedConfig
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation.runner import Job, ModelFacts, Reply, Runner
from braidlora.federated.site.clients import Clients
from braidlora.processes import Pool


class Workers:
    """Does jobs as a `Runner` does, `federation.workers` at a time.

    Args:
        config: the recipe.
        clients: the clients that jobs may name.

    Raises:
        WorkerLost: a process died, and so did those of all retries.
        BraidloraError: what a process could not load.
    """

    remote = False

    def __init__(self, config: FederatedConfig, clients: Clients) -> None:
        # As many threads as here, since sums depend on their number.
        self._pool = Pool(
            config.federation.workers,
            _runner,
            (config, clients, torch.get_num_threads()),
            retries=config.federation.retries,
            remedy="Lower federation.workers, then --resume auto.",
        )

    def facts(self) -> ModelFacts:
        """Of the model."""
        return self._pool.run(_facts, None)

    def prepare(self, server: Server) -> None:
        """Nothing: states in the run directory are compared when they are read."""

    def run_all(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Every job with its reply, in the order of the jobs."""
        return self._pool.in_order(Runner.run, jobs)

    def run(self, job: Job) -> Reply:
        """Do a job in the next idle process; raises what `Runner.run` raises there."""
        return self._pool.run(Runner.run, job)

    def close(self) -> None:
        """Kill the processes."""
        self._pool.close()


class JobRunner(Protocol):
    """Does clients' jobs somewhere: in this process, in others, or at sites that a network reaches.

    Attributes:
        remote: whether clients keep their states and results elsewhere than in the run directory.
    """

    remote: bool

    def facts(self) -> ModelFacts:
        """Of the model."""

    def prepare(self, server: Server) -> None:
        """Called once the server's state is known, before the first round."""

    def run_all(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Every job with its reply, in any order."""

    def run(self, job: Job) -> Reply:
        """Do one job."""

    def close(self) -> None:
        """Release what it holds."""


def _runner(config: FederatedConfig, clients: Clients, threads: int) -> Runner:
    torch.set_num_threads(threads)
    return Runner(config, clients)


def _facts(runner: Runner, _: None) -> ModelFacts:
    return runner.facts()
