"""Does clients' jobs on one base in memory: training, scoring, writing the final adapter."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from braidlora.config import FederatedConfig
from braidlora.errors import CheckpointError, ConfigError, Interrupted
from braidlora.federated.protocol.client import Payload, client_step, first_state, received
from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.failure import Failure, failure_of, keep_at_site
from braidlora.federated.protocol.update import ClientUpdate
from braidlora.federated.protocol.wire import pack, unpack
from braidlora.federated.site.clients import Client, Clients
from braidlora.federated.site.export import save_client_adapter
from braidlora.federated.site.host import Host
from braidlora.federated.site.scores import Scorer, Scores
from braidlora.federated.site.state import ClientState, SavedState
from braidlora.runs import BaseRecord


@dataclass(frozen=True)
class Job:
    """Something to do for one client: train where `keep` is given, otherwise look at the model as received.

    Args:
        client: its name.
        payload: what the server sends it, packed.
        round, since, whole: of the payload.
        state: the client's state on disk; None before its first round.
        keep: train, and write the new state to this file.
        score: score the model: after training, or as received.
        score_before: score it before training as well.
        predictions: write the answers of that scoring into this folder, a file per task.
        adapter: write the model as received into this folder, as a PEFT adapter.
        site: the client's own folder, where the texts of its errors stay.
    """

    client: str
    payload: bytes
    round: int
    since: int
    whole: bool
    state: SavedState | None
    keep: Path | None = None
    score: bool = False
    score_before: bool = False
    predictions: Path | None = None
    adapter: Path | None = None
    site: Path | None = None


@dataclass(frozen=True)
class Reply:
    """What came of a job; where the client failed `failure` says of what kind, and nothing else is filled in.

    Args:
        client: its name.
        failure: how the client failed.
        terms: the update without its tensors, which are packed in `upload`.
        loss, losses, steps, seconds: of the training; `losses` by task.
        before, scores: before training, and after it or of the model as received; without the answers.
        kept: where the new state was written.
    """

    client: str
    failure: Failure | None = None
    terms: ClientUpdate | None = None
    upload: bytes = b""
    loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    before: Scores | None = None
    scores: Scores | None = None
    kept: SavedState | None = None

    def update(self) -> ClientUpdate:
        """The update as it comes off the wire.

        Raises:
            FederationError: the upload is no safetensors.
        """
        assert self.terms is not None
        return dataclasses.replace(self.terms, tensors=unpack(self.upload))


@dataclass(frozen=True)
class ModelFacts:
    """What a server must know of the model that clients train.

    Args:
        layers: the adapted layers.
        head: packed, the tensors that are trained in full as all clients start with them.
        base: the record of the base; `sampled` is its fingerprint of braidlora 0.1.
    """

    layers: list[AdaptedLayer]
    head: bytes
    base: BaseRecord
    sampled: str


class JobRunner(Protocol):
    """Who does jobs: `Runner` in this process, `Workers` in several."""

    def facts(self) -> ModelFacts:
        """Of the model."""

    def run_all(self, jobs: Iterable[Job], experiment: str) -> Iterator[tuple[Job, Reply]]:
        """Every job with its reply, in the order of the jobs."""

    def run(self, job: Job, experiment: str) -> Reply:
        """Do one job."""

    def close(self) -> None:
        """Let go of the model."""


class Runner:
    """Does jobs one after the other, on a base of its own.

    Args:
        config: the recipe.
        clients: who may be named in jobs.
    """

    def __init__(self, config: FederatedConfig, clients: Clients) -> None:
        self._clients = clients.by_name
        self._host = Host(config, clients.label_space)
        self._scorer = Scorer(self._host, clients.common)
        # The Trainer collects garbage at every start, and need not walk through all that stays anyway.
        gc.collect()
        gc.freeze()

    def facts(self) -> ModelFacts:
        """Of the model."""
        host = self._host
        return ModelFacts(host.layers, pack(host.head), host.base, host.sampled)

    def run_all(self, jobs: Iterable[Job], experiment: str) -> Iterator[tuple[Job, Reply]]:
        """Every job with its reply, in the order of the jobs."""
        for job in jobs:
            yield job, self.run(job, experiment)

    def run(self, job: Job, experiment: str) -> Reply:
        """Do a job. How a client failed stands in the reply; what is wrong with the federation itself is raised.

        Raises:
            CheckpointError: the client's state is damaged, another's, or does not fit.
            ConfigError: a setting turns out not to be possible.
            OSError: a file cannot be written.
        """
        client = self._clients[job.client]
        payload = Payload(job.round, job.since, unpack(job.payload), job.whole)
        if job.state is None:
            state = first_state(self._host, client, experiment)
        else:
            state = ClientState.load(job.state, client.name, experiment)
        if job.keep is None:
            return self._look(job, client, payload, state)
        try:
            result = client_step(
                self._host, client, payload, state,
                score=(lambda: self._scorer.score(client)) if job.score else None, score_before=job.score_before,
            )  # fmt: skip
        except (CheckpointError, ConfigError, Interrupted):
            raise
        except Exception as error:  # a client may fail in any way, and the others go on
            return _failed(job, error)
        return Reply(
            client.name,
            kept=result.state.save(job.keep),
            terms=dataclasses.replace(result.update, tensors={}),
            upload=pack(result.update.tensors),
            loss=result.loss,
            losses=result.losses,
            steps=result.steps,
            seconds=result.seconds,
            before=_plain(result.before),
            scores=_plain(result.after),
        )

    def _look(self, job: Job, client: Client, payload: Payload, state: ClientState) -> Reply:
        """Score the model as received, or write it as an adapter."""
        tensors = received(self._host, client, payload, state)
        self._host.wear(client.rank, client.scaling, tensors)
        if job.adapter is not None:
            save_client_adapter(self._host, client, tensors, job.adapter)
        if not job.score:
            return Reply(client.name)
        try:
            scores = self._scorer.score(client)
        except (CheckpointError, ConfigError, Interrupted):
            raise
        except Exception as error:  # as above
            return _failed(job, error)
        if job.predictions is not None:
            scores.write_predictions(job.predictions)
        return Reply(client.name, scores=_plain(scores))

    def close(self) -> None:
        """Let go of the model."""
        gc.unfreeze()


def _failed(job: Job, error: Exception) -> Reply:
    if job.site is not None:
        keep_at_site(error, job.site, job.round)
    return Reply(job.client, failure=failure_of(error))


def _plain(scores: Scores | None) -> Scores | None:
    return None if scores is None else scores.without_records()
