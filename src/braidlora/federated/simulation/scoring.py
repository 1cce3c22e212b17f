"""Which clients' models a federation scores after a round, and their scoring."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from braidlora.config import FederatedConfig
from braidlora.errors import FederationError
from braidlora.federated.protocol.failure import Failure
from braidlora.federated.simulation.runner import Job, JobRunner
from braidlora.federated.site.scores import Scores, scored_clients
from braidlora.runs import FederatedDirectory


class Scoring:
    """The recipe's choice of rounds and clients to score.

    Args:
        config: the recipe.
        names: of all clients.
        directory: where the answers after the last round go.

    Attributes:
        sample: the clients that are scored in every round that is scored; after the last round all are.
    """

    def __init__(
        self, config: FederatedConfig, names: Collection[str], directory: FederatedDirectory
    ) -> None:
        self._every, self._last = config.federation.evaluate_every, config.federation.rounds
        self._names, self._directory = list(names), directory
        self.sample = scored_clients(names, config.federation.evaluate_sample, config.seed)

    def is_due(self, round: int) -> bool:
        """Whether a round is scored."""
        return round == self._last or (self._every > 0 and round % self._every == 0)

    def clients(self, round: int) -> set[str]:
        """Clients that are scored in a round: none, a sample, or after the last one all."""
        if not self.is_due(round):
            return set()
        return set(self._names) if round == self._last else self.sample

    def score(
        self,
        round: int,
        job_of: Callable[[str], Job],
        runner: JobRunner,
        experiment: str,
        more_at: Callable[[str], str],
    ) -> tuple[dict[str, Scores], dict[str, Failure]]:
        """Scores of clients' models after a round, and how the scoring of others failed.

        Args:
            job_of: what a client is given, with the model to be scored.
            runner: does the jobs.
            experiment: the federation's id.
            more_at: a sentence on where a client's whole error stands.

        Raises:
            FederationError: after the last round a client cannot be scored.
        """
        scored, last = self.clients(round), round == self._last
        jobs = (
            replace(
                job_of(name),
                score=True,
                predictions=self._directory.client(name) / "predictions" if last else None,
            )
            for name in self._names
            if name in scored
        )
        scores, failed = {}, {}
        for job, reply in runner.run_all(jobs, experiment):
            if reply.scores is not None:
                scores[job.client] = reply.scores
            elif reply.failure is not None:
                failed[job.client] = reply.failure
        if failed and last:
            raise FederationError(
                "the final models cannot be scored: "
                + ", ".join(f"{name}: {failure}" for name, failure in failed.items())
                + f".{more_at('NAME')} Fix the cause, then --resume auto."
            )
        return scores, failed
