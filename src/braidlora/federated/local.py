"""`federate`: a whole federation in this process, from the recipe to every client's adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from braidlora.config import FederatedConfig, dump_config
from braidlora.errors import CheckpointError, ConfigError, FederationError
from braidlora.federated.clients import Clients, load_clients
from braidlora.federated.exchange import Exchange, exchange
from braidlora.federated.experiment import check_identity, check_scoring, experiment_id, identity
from braidlora.federated.progress import RoundBar
from braidlora.federated.results import References, final_metrics, round_line
from braidlora.federated.rounds import CLIENTS, newest_round, prune, write_round
from braidlora.federated.runner import Job, JobRunner, Reply, Runner
from braidlora.federated.scores import Scores
from braidlora.federated.server import Server
from braidlora.federated.spool import Spool
from braidlora.federated.wire import pack, unpack
from braidlora.federated.workers import Workers
from braidlora.runs import (
    FederatedDirectory,
    atomic_write_json,
    atomic_write_text,
    commit_directory,
    environment,
    read_json,
)
from braidlora.training.checkpoint import warn_of_another_machine
from braidlora.training.run import disk_failures_told, threads
from braidlora.training.stop import StopRequest, stop_requests


@dataclass(frozen=True)
class FederationResult:
    """Where a federation stands and what it scored: `metrics` is the content of `metrics.json`."""

    directory: Path
    metrics: dict[str, Any]


def federate(
    config: FederatedConfig,
    *,
    resume: Literal["auto"] | None = None,
    overwrite: bool = False,
    references: Path | None = None,
    progress: bool = True,
) -> FederationResult:
    """Train the recipe's clients together, and save and score every client's model.

    Args:
        config: the recipe.
        resume: `auto` goes on after the last complete round in the output directory, if there is one. The result is
            that of an uninterrupted federation, on a CPU to the bit.
        overwrite: remove what an earlier federation left there, once everything needed is loaded.
        references: directory of a finished federation by rule `local`, against which Δm% is measured.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError, DataError: the recipe or its data is not usable; nothing has been written.
        CheckpointError: the directory holds another federation, or a round or a client's state is damaged.
        FederationError: all that were asked failed in a round (where one is asked: in two in succession, not the same
            one), or no round had enough clients.
        TrainingError: the disk is full or not writable; committed rounds stay.
        Interrupted: SIGTERM or Ctrl-C; the round in hand is dropped, committed rounds stay.
    """
    if resume is not None and overwrite:
        raise ConfigError(
            "--resume and --overwrite exclude each other: one carries on, the other starts over."
        )
    directory = FederatedDirectory.at(config.output)
    directory.refuse_to_lose(resume=resume is not None, overwrite=overwrite)
    compared = References.read(references) if references is not None else None
    with stop_requests() as stop, threads(config.training.threads):
        clients = load_clients(config)
        if compared is not None:
            compared.check(clients)
        runner: JobRunner = (
            Runner(config, clients) if config.federation.workers == 1 else Workers(config, clients)
        )
        try:
            with disk_failures_told(directory):
                return _Federation(config, directory, clients, runner, compared, stop, progress).run(resume)
        finally:
            runner.close()


class _Federation:
    """The steps of `federate` once everything is loaded."""

    def __init__(
        self,
        config: FederatedConfig,
        directory: FederatedDirectory,
        clients: Clients,
        runner: JobRunner,
        references: References | None,
        stop: StopRequest,
        progress: bool,
    ) -> None:
        self.config, self.directory, self.clients, self.runner = config, directory, clients, runner
        self.references, self.stop, self.progress = references, stop, progress
        facts = runner.facts()
        self.identity = identity(config, clients, facts.fingerprint)
        self.experiment = experiment_id(self.identity)
        self.updates = Spool()
        self.server = Server(config, clients.by_name, facts.layers, unpack(facts.head), self.updates)
        self.rounds = config.federation.rounds
        self.log: list[str] = []  # lines of rounds.jsonl
        self.folder: Path | None = None  # the last committed round
        self.scores: dict[str, Scores] = {}  # of the aggregated models, where that round was scored
        self.earlier, self.start = 0.0, time.monotonic()

    def run(self, resume: str | None) -> FederationResult:
        """All rounds that are left, and what follows the last one."""
        finished = self.directory.state() == "finished"
        if finished and resume is not None and not self.directory.checkpoint_steps():
            raise CheckpointError(
                f"{self.directory.path}: a finished federation whose rounds are gone, so there is nothing to carry on "
                f"with. {self.directory.metrics.name} and the clients' adapters are untouched; --overwrite starts over "
                "and loses them."
            )
        done = self._begin(resume)
        if finished and done == self.rounds and self.references is None:
            return FederationResult(self.directory.path, read_json(self.directory.metrics))
        self.directory.metrics.unlink(missing_ok=True)
        asked = self.config.asked_per_round(len(self.clients.by_name))
        bar = RoundBar(self.rounds, asked, done, self.progress)
        try:
            for round in range(done + 1, self.rounds + 1):
                bar.begin(round)
                self._round(round, bar)
        finally:
            bar.close()
        return FederationResult(self.directory.path, self._finish())

    # ---- beginning and resuming

    def _begin(self, resume: str | None) -> int:
        """Write what is known before the first round, or take up the last one. Gives the number of rounds done."""
        directory, here = self.directory, environment()
        committed = None
        if resume is not None and directory.checkpoint_steps():
            check_identity(directory, self.identity)
            check_scoring(directory, self.config)
            committed = newest_round(directory, self.experiment)
        if committed is not None and committed.round > self.rounds:
            raise CheckpointError(
                f"{directory.path}: has {committed.round} rounds already, and federation.rounds is {self.rounds}. Give "
                "at least as many, or start over with --overwrite."
            )
        directory.path.mkdir(parents=True, exist_ok=True)
        if committed is None:
            directory.clear()
        # First, for it says that this folder is a federation's, whatever happens next.
        atomic_write_text(directory.config, dump_config(self.config))
        directory.remove_partial()
        if committed is not None:
            first = read_json(directory.environment)
            warn_of_another_machine(first, here)
            here = {**first, "resumed": [*first.get("resumed", []), {"after": committed.round, **here}]}
            self.server.shared = committed.shared
            self.server.since, self.server.counted = committed.server["since"], committed.server["counted"]
            self.server.typical_size = committed.server.get("typical_size")
            self.scores = {name: Scores(**one) for name, one in committed.server["scores"].items()}
            self.log, self.folder, self.earlier = committed.log, committed.folder, committed.server["seconds"]
        atomic_write_json(directory.environment, here)
        atomic_write_json(directory.experiment, {"id": self.experiment, **self.identity})
        atomic_write_json(directory.partition, self.clients.report())
        if numbers := self.clients.row_numbers():
            atomic_write_text(directory.partition_rows, numbers)
        if self.clients.label_space is not None:
            atomic_write_text(directory.labels, self.clients.label_space.to_json())
        self._write_log()
        return committed.round if committed is not None else 0

    # ---- a round

    def _round(self, round: int, bar: RoundBar) -> None:
        start, asked = time.monotonic(), self.server.sample(round)
        target = self.directory.checkpoint(round)
        linked: dict[str, Any] = {}
        with commit_directory(target, linked) as staging:
            (staging / CLIENTS).mkdir()
            with self.updates.inside(staging / "updates"):
                self.server.open(round, asked)
                took_part = self._exchange(round, asked, staging, bar)
                why_not = self.server.close()
            for name in asked:
                if why_not or name not in took_part.replies:  # then nothing has changed for the client
                    (staging / CLIENTS / _file(name)).unlink(missing_ok=True)
            scores = {}
            if self._is_scored(round):
                bar.scoring(round)
                scores = self._score(round, staging)
            line = round_line(round, why_not, took_part, scores, self._known(), self.server.changes)
            line["timing"] = {
                "seconds": _milliseconds(time.monotonic() - start),
                "clients": {name: _milliseconds(reply.seconds) for name, reply in took_part.replies.items()},
            }
            log = [*self.log, json.dumps(line, ensure_ascii=False, allow_nan=False)]
            server = {
                "experiment": self.experiment,
                "round": round,
                "since": self.server.since,
                "counted": self.server.counted,
                "typical_size": self.server.typical_size,
                "scores": {name: one.to_json() for name, one in scores.items()},
                "seconds": _milliseconds(self._seconds()),
            }
            linked.update(write_round(staging, self.folder, self.server.shared, server, log))
            self.stop.deferred = True  # from here on the round is as good as committed
        self.log, self.folder, self.scores = log, target, scores
        self._write_log()
        prune(self.directory, round)
        self.stop.deferred = False
        if self.stop.signal_number:
            raise self.stop.interrupted(
                f"{self.directory.path}: stopped after round {round}, which is saved,"
            )

    def _exchange(self, round: int, asked: list[str], staging: Path, bar: RoundBar) -> Exchange:
        scored = self._is_scored(round)

        def jobs() -> Iterator[Job]:
            for name in asked:
                yield replace(
                    self._job(name, round, self.folder),
                    keep=staging / CLIENTS / _file(name),
                    score=scored,
                    score_before=scored and name not in self._known(),
                )

        def heard(reply: Reply, down: int) -> None:
            bar.heard(reply, down)
            if self.stop.signal_number:  # a library may have swallowed the exception
                raise self.stop.interrupted(
                    f"{self.directory.path}: stopped in round {round}, which is dropped,"
                )

        took_part = exchange(
            self.server, self.runner, jobs(), self.experiment,
            retries=self.config.federation.retries, heard=heard,
        )  # fmt: skip
        if not took_part.replies and not self._may_be_one_clients_fault(asked):
            who = f"all {len(asked)} clients" if len(asked) > 1 else "the one client that was asked"
            raise FederationError(
                f"round {round}: {who} failed, at {1 + self.config.federation.retries} tries each. "
                + " ".join(f"{name}: {reasons[-1]}" for name, reasons in took_part.failed.items())
                + (
                    f" So did the one asked in round {round - 1}, which is skipped."
                    if len(asked) == 1 < len(self.clients.by_name)
                    else ""
                )
                + (f" Intact: {self.folder.name}." if self.folder is not None else "")
                + " Mend the cause, then --resume auto."
            )
        return took_part

    def _may_be_one_clients_fault(self, asked: list[str]) -> bool:
        """Whether a round in which all failed says nothing of the others: one was asked, and no other just before."""
        if len(asked) > 1 or len(self.clients.by_name) == 1:
            return False
        last = json.loads(self.log[-1]) if self.log else {}
        others = last.get("failed", {}).keys() - set(asked)
        trained = any("loss" in one for one in last.get("clients", {}).values())
        return trained or not others

    def _known(self) -> dict[str, Scores]:
        """Scores that the last round's aggregated models had, where a client starts from just these models."""
        return {} if self.config.federation.state == "reset-each-round" else self.scores

    def _is_scored(self, round: int) -> bool:
        every = self.config.federation.evaluate_every
        return round == self.rounds or (every > 0 and round % every == 0)

    def _score(self, round: int, newest: Path) -> dict[str, Scores]:
        """Scores of every client's aggregated model: the new shared state with what the client keeps.

        Args:
            newest: the round's folder, in the making; who took no part has its state in the one before.
        """

        def jobs() -> Iterator[Job]:
            for name in self.clients.by_name:
                folder = newest if (newest / CLIENTS / _file(name)).exists() else self.folder
                predictions = self.directory.client(name) / "predictions" if round == self.rounds else None
                yield replace(self._job(name, round + 1, folder), score=True, predictions=predictions)

        scores = {}
        for job, reply in self.runner.run_all(jobs(), self.experiment):
            assert reply.scores is not None
            scores[job.client] = reply.scores
        return scores

    def _job(self, name: str, round: int, folder: Path | None) -> Job:
        """What a client is given for a round; its state is looked for in `folder`, a round's."""
        payload = self.server.payload(name, round)
        state = folder / CLIENTS / _file(name) if folder is not None else None
        return Job(
            name, pack(payload.tensors), round, payload.since, payload.whole,
            state if state is not None and state.exists() else None,
        )  # fmt: skip

    # ---- the end

    def _finish(self) -> dict[str, Any]:
        """Every client's adapter, and the metrics."""
        if self.server.since == 0:
            needed = self.server.needed()
            raise FederationError(
                f"none of {self.rounds} rounds had the {needed} clients that a round needs (or the quorum), so nothing "
                f"was learnt. {self.directory.log} says why clients failed; lower federation.min_clients or quorum."
            )
        jobs = (
            replace(
                self._job(name, self.rounds + 1, self.folder), adapter=self.directory.client(name) / "adapter"
            )
            for name in self.clients.by_name
        )
        for _ in self.runner.run_all(jobs, self.experiment):
            pass
        # A federation that was to have more rounds has not scored its last one.
        assert self.folder is not None
        scores = self.scores or self._score(self.rounds, self.folder)
        metrics = final_metrics(self.config.federation.rule, self.clients, self.log, scores, self.references)
        metrics["seconds"] = _milliseconds(self._seconds())
        atomic_write_json(self.directory.metrics, metrics)
        return metrics

    def _seconds(self) -> float:
        return self.earlier + time.monotonic() - self.start

    def _write_log(self) -> None:
        atomic_write_text(self.directory.log, "".join(line + "\n" for line in self.log))


def _file(client: str) -> str:
    return f"{client}.safetensors"


def _milliseconds(seconds: float) -> float:
    return round(seconds, 3)
