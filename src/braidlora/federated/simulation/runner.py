"""Does clients' jobs on one base model in memory: training, scoring, writing the final adapter."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from braidlora.config import FederatedConfig
from braidlora.errors import CheckpointError, ConfigError, Interrupted
from braidlora.federated.protocol.client import client_step, first_state, hides_from_server, received
from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.failure import Failure, failure_of
from braidlora.federated.protocol.payload import Payload
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.settle import counted_state
from braidlora.federated.protocol.wire import Message, pack, pack_message, unpack_payload
from braidlora.federated.site.clients import Client, Clients
from braidlora.federated.site.errors import keep_at_site
from braidlora.federated.site.export import save_client_adapter
from braidlora.federated.site.group import Group
from braidlora.federated.site.host import Host
from braidlora.federated.site.scores import Scorer, Scores
from braidlora.federated.site.store import ClientStore
from braidlora.runs import BaseRecord


@dataclass(frozen=True)
class Job:
    """A message to a client: what to do with a payload.

    Args:
        client: its name.
        site: its own folder, with its states, its errors and its results.
        payload: from the server, packed.
        train: take part in the round; otherwise look at the model as received.
        score: score the model, after training or as received.
        score_before: score it before training as well.
        save_predictions: keep the answers of a scoring without training, a file per task.
        save_adapter: write the model as received as a PEFT adapter.
    """

    client: str
    site: Path
    payload: Message
    train: bool = False
    score: bool = False
    score_before: bool = False
    save_predictions: bool = False
    save_adapter: bool = False


@dataclass(frozen=True)
class Reply:
    """A client's answer to a job; if it failed, only `failure` is filled in.

    Args:
        client: its name.
        failure: how the client failed.
        update: packed, for the server.
        loss, losses, steps, seconds: of the training; `losses` by task. With privacy from the server, loss is None.
        before, scores: before training, and after it or of the model as received; without the answers.
    """

    client: str
    failure: Failure | None = None
    update: Message | None = None
    loss: float | None = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    before: Scores | None = None
    scores: Scores | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a server must know of the model that clients train.

    Args:
        layers: the adapted layers.
        head: packed, the initial tensors of modules that are trained in full.
        base: the record of the base model; `sampled` is its fingerprint as of braidlora 0.1.
    """

    layers: list[AdaptedLayer]
    head: bytes
    base: BaseRecord
    sampled: str


class Runner:
    """Does jobs one after the other, on a base model of its own.

    Args:
        config: the recipe.
        clients: those that jobs may name.
        group: processes that train together, of which this is the first; None: this one alone.
    """

    remote = False

    def __init__(self, config: FederatedConfig, clients: Clients, group: Group | None = None) -> None:
        self._group = group
        self._clients, self._keep_rounds = clients.by_name, config.federation.keep_rounds
        with group.together() if group is not None else nullcontext():
            self._host = Host(config, clients.label_space, group)
        self._scorer = Scorer(self._host, clients.common)
        # The Trainer collects garbage at every start, and need not scan what stays anyway.
        gc.collect()
        gc.freeze()

    def facts(self) -> ModelFacts:
        """Of the model."""
        host = self._host
        return ModelFacts(host.layers, pack(host.head), host.base, host.sampled)

    def prepare(self, server: Server) -> None:
        """Nothing: states in the run directory are compared when they are read."""

    def run_all(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Every job with its reply, in the order of the jobs."""
        for job in jobs:
            yield job, self.run(job)

    def run(self, job: Job) -> Reply:
        """Do a job. The reply says how a client failed; what is wrong with the federation itself is raised.

        Raises:
            CheckpointError: the client's state is damaged, another's, or does not fit the payload or the model.
            ConfigError: a setting turns out to be impossible.
            OSError: a file cannot be written.
        """
        client = self._clients[job.client]
        payload = unpack_payload(job.payload)
        store = ClientStore(job.site, client.name, self._keep_rounds)
        do = self._train if job.train else self._look
        return do(job, client, payload, store)

    def _train(self, job: Job, client: Client, payload: Payload, store: ClientStore) -> Reply:
        scores: dict[str, Scores] = {}
        hides = hides_from_server(self._host.config)

        def observe(stage: str) -> None:
            if job.score and not hides and (stage == "after" or job.score_before):
                scores[stage] = self._scorer.score(client).without_records()

        try:
            result = client_step(self._host, client, payload, store, observe=observe)
        except (CheckpointError, ConfigError, Interrupted):
            raise
        except Exception as error:  # a client may fail in any way, and the others continue
            return _failed(job, payload.round, error)
        store.hold(result.state)
        if hides:  # losses and scores of a model trained on the client's rows tell of them, without noise
            return Reply(client.name, update=pack_message(result.update), loss=None, seconds=result.seconds)
        return Reply(
            client.name,
            update=pack_message(result.update),
            loss=result.loss,
            losses=result.losses,
            steps=result.steps,
            seconds=result.seconds,
            before=scores.get("before"),
            scores=scores.get("after"),
        )

    def _look(self, job: Job, client: Client, payload: Payload, store: ClientStore) -> Reply:
        """Score the model as received, or write it as an adapter. The client's states do not change."""
        state = counted_state(store, payload) or first_state(self._host, client, payload.experiment)
        tensors = received(self._host, client, payload, state)
        self._host.load(client.rank, client.scaling, tensors)
        if job.save_adapter:
            save_client_adapter(self._host, client, tensors, job.site / "adapter")
        if not job.score:
            return Reply(client.name)
        try:
            scores = self._scorer.score(client)
        except (CheckpointError, ConfigError, Interrupted):
            raise
        except Exception as error:  # as above
            return _failed(job, payload.round, error)
        if job.save_predictions:
            scores.write_predictions(job.site / "predictions")
        return Reply(client.name, scores=scores.without_records())

    def close(self) -> None:
        """Release the model, and the processes that train with this one."""
        gc.unfreeze()
        if self._group is not None:
            self._group.end()


def _failed(job: Job, round: int, error: Exception) -> Reply:
    keep_at_site(error, job.site, round)
    return Reply(job.client, failure=failure_of(error))
