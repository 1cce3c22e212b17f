"""Which clients' models a federation scores after a round, and how."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from braidlora.config import FederatedConfig
from braidlora.errors import FederationError
from braidlora.federated.protocol.failure import Failure
from braidlora.federated.simulation.runner import Job, JobRunner
from braidlora.federated.site.scores import Scores, scored_clients


class Scoring:
    """The recipe's choice of rounds and clients to score.

    Args:
        config: the recipe.
        names: of all clients.

    Attributes:
        sample: the clients that are scored in every scored round; after the last round all are.
    """

    def __init__(self, config: FederatedConfig, names: Collection[str]) -> None:
        self._every, self._last = config.federation.evaluate_every, config.federation.rounds
        self._names = list(names)
        self.sample = scored_clients(names, config.federation.evaluate_sample, config.seed)

    def is_due(self, round: int) -> bool:
        """Whether a round is scored."""
        return round == self._last or (self._every > 0 and round % self._every == 0)

    def clients(self, round: int) -> set[str]:
        """The clients that are scored in a round: none, a sample, or after the last one all."""
        if not self.is_due(round):
            return set()
        return set(self._names) if round == self._last else self.sample

    def score(
        self,
        round: int,
        job_of: Callable[[str], Job],
        runner: JobRunner,
        see_also: str,
    ) -> tuple[dict[str, Scores], dict[str, Failure]]:
        """Scores of clients' models after a round, and the failures of those that could not be scored.

        Args:
            job_of: a client's job, with the payload of the model to score.
            runner: runs the jobs.
            see_also: a sentence on where the clients' full errors are.

        Raises:
            FederationError: after the last round a client cannot be scored.
        """
        scored, last = self.clients(round), round == self._last
        jobs = (
            replace(job_of(name), score=True, save_predictions=last) for name in self._names if name in scored
        )
        scores, failed = {}, {}
        for job, reply in runner.run_all(jobs):
            if reply.scores is not None:
                scores[job.client] = reply.scores
            elif reply.failure is not None:
                failed[job.client] = reply.failure
        if failed and last:
            raise FederationError(
                "the final models cannot be scored: "
                + ", ".join(f"{name}: {failure}" for name, failure in failed.items())
                + f".{see_also} Fix the cause, then --resume auto."
            )
        return scores, failed
