"""`federate`: a whole federation in this process, from the recipe to every client's adapter."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from braidlora.config import FederatedConfig, dump_config
from braidlora.errors import ConfigError, FederationError
from braidlora.federated.protocol.failure import ERRORS, Failure
from braidlora.federated.protocol.outliers import Typical
from braidlora.federated.protocol.schedule import learning_rate
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.wire import pack, unpack
from braidlora.federated.simulation.exchange import Exchange, exchange
from braidlora.federated.simulation.final import final_files
from braidlora.federated.simulation.progress import RoundBar
from braidlora.federated.simulation.results import References, final_metrics, round_line, scored_with
from braidlora.federated.simulation.resume import experiment_id, identity, is_scoring, settings
from braidlora.federated.simulation.resume_from import resume_from
from braidlora.federated.simulation.rounds import (
    CLIENTS,
    Committed,
    committed_round,
    prune,
    state_file,
    write_round,
)
from braidlora.federated.simulation.runner import Job, JobRunner, Reply, Runner
from braidlora.federated.simulation.scoring import Scoring
from braidlora.federated.simulation.spool import Spool
from braidlora.federated.simulation.workers import Workers
from braidlora.federated.site.clients import Clients, load_clients
from braidlora.federated.site.scores import Scores
from braidlora.federated.site.state import SavedState
from braidlora.json_text import loads
from braidlora.runs import (
    MANIFEST,
    FederatedDirectory,
    atomic_write_json,
    atomic_write_text,
    commit_directory,
    cover,
    covered,
    environment,
    hold,
    json_text,
    refuse_changed,
    warn_of_another_machine,
)
from braidlora.training.failures import explain_disk_failures
from braidlora.training.stop import StopRequest, stop_requests
from braidlora.training.threads import cpu_threads


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
    rollback: int | None = None,
    references: Path | None = None,
    progress: bool = True,
) -> FederationResult:
    """Train the recipe's clients together, and save and score every client's model.

    Args:
        config: the recipe.
        resume: `auto` goes on after the last complete round in the output directory, if there is one. The result is
            that of an uninterrupted federation, on a CPU to the bit.
        overwrite: remove what an earlier federation left there, once everything needed is loaded.
        rollback: with `resume`, first go back to this round and remove those after it, once everything needed is loaded
            and it is certain that this is the same federation. `braidlora.federated.simulation.rollback` does so alone.
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
    if rollback is not None and resume is None:
        raise ConfigError(
            "--rollback goes with --resume auto here; braidlora.federated.simulation.rollback goes back and no further."
        )
    directory = FederatedDirectory.at(config.output)
    with hold(directory.path):
        return _federate(config, directory, resume, overwrite, rollback, references, progress)


def _federate(
    config: FederatedConfig,
    directory: FederatedDirectory,
    resume: Literal["auto"] | None,
    overwrite: bool,
    rollback: int | None,
    references: Path | None,
    progress: bool,
) -> FederationResult:
    with explain_disk_failures(directory):
        directory.restore()
    directory.refuse_to_lose(resume=resume is not None, overwrite=overwrite)
    compared = References.read(references) if references is not None else None
    with stop_requests() as stop, cpu_threads(config.training.threads):
        clients = load_clients(config)
        if compared is not None:
            compared.check(clients)
        runner: JobRunner = (
            Runner(config, clients) if config.federation.workers == 1 else Workers(config, clients)
        )
        try:
            with explain_disk_failures(directory):
                made = _Federation(config, directory, clients, runner, compared, stop, progress)
                return made.run(resume, rollback)
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
        self.identity, self.sampled = identity(config, clients, facts.base), facts.sampled
        self.experiment = experiment_id(self.identity)
        self.updates = Spool()
        self.server = Server(config, clients.by_name, facts.layers, unpack(facts.head), self.updates)
        self.rounds = config.federation.rounds
        self.settings = settings(config)
        self.scoring = Scoring(config, clients.by_name, directory)
        self.log: list[str] = []  # lines of rounds.jsonl
        self.last: Committed | None = None  # the last committed round
        self.scores: dict[str, Scores] = {}  # of the aggregated models, where that round was scored
        self.changes: dict[str, Any] = {}  # what is other than in that round
        self.left_out: set[str] = set()  # clients that were once
        self.earlier, self.start = 0.0, time.monotonic()

    def run(self, resume: str | None, rollback: int | None) -> FederationResult:
        """All rounds that are left, and what follows the last one."""
        finished = self.directory.state() == "finished" and resume is not None
        text = (
            self._intact_metrics()
            if finished and rollback is None and self.directory.checkpoint_steps()
            else None
        )
        done = self._begin(resume, rollback)
        if text is not None and done == self.rounds and self.references is None:
            metrics: dict[str, Any] = loads(text)
            now = scored_with(self.clients, self.settings)
            if metrics.get("scored_with", now) == now:
                self._vouch(text)
                return FederationResult(self.directory.path, metrics)
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

    def _intact_metrics(self) -> bytes | None:
        """The metrics of a finished federation that stands there as it was written; None where a part is missing.

        Raises:
            CheckpointError: a file has changed since it was written.
        """
        directory, name = self.directory, self.directory.metrics.name
        members = directory.read_json(directory.partition.name)  # a client that joins has no adapter yet
        missing = refuse_changed(
            directory.path,
            [directory.client(one) / "adapter" for one in self.clients.by_name if one in members],
        )
        for problem in missing:
            warnings.warn(f"made again from the last round: {problem}", stacklevel=2)
        return directory.read(name) if not missing and name in (covered(directory.path) or {}) else None

    def _vouch(self, metrics: bytes) -> None:
        """Put all that stands at the end into the federation's manifest, `metrics.json` ahead of its being written."""
        files = [self.directory.log.name]
        for name in self.directory.client_adapters():
            files += final_files(self.directory, name)
            if self.directory.was_added(name):
                files.append(f"clients/{name}/added.json")
        cover(self.directory.path, files, {self.directory.metrics.name: metrics})

    # ---- beginning and resuming

    def _begin(self, resume: str | None, rollback: int | None) -> int:
        """Write what is known before the first round, or take up the last one. Gives the number of rounds done."""
        directory, here = self.directory, environment()
        committed = None
        if resume is not None:
            found = resume_from(
                directory, self.config, self.clients, self.identity, self.sampled, self.settings, rollback
            )
            if found is not None:
                self.experiment, self.identity = found.experiment, found.identity
                committed, self.changes = found.committed, found.changes
        first = directory.read_json(directory.environment.name) if committed is not None else {}
        directory.path.mkdir(parents=True, exist_ok=True)
        if committed is None:
            directory.clear()
        (directory.path / MANIFEST).unlink(missing_ok=True)  # until what it lists stands again
        # First, for it says that this folder is a federation's, whatever happens next.
        atomic_write_text(directory.config, dump_config(self.config))
        directory.remove_partial()
        if committed is not None:
            prune(directory, committed.round, self.config.federation.keep_rounds)
            warn_of_another_machine(first, here)
            resumed = {
                "after": committed.round,
                **({"changes": self.changes} if self.changes else {}),
                **here,
            }
            here = {**first, "resumed": [*first.get("resumed", []), resumed]}
            self._take_up(committed)
        atomic_write_json(directory.environment, here)
        atomic_write_json(directory.experiment, {"id": self.experiment, **self.identity})
        atomic_write_json(directory.partition, self.clients.report())
        if numbers := self.clients.row_numbers():
            atomic_write_text(directory.partition_rows, numbers)
        if self.clients.label_space is not None:
            atomic_write_text(directory.labels, self.clients.label_space.to_json())
        self._write_log()
        names = [name for name in directory.BEGINNING if (directory.path / name).is_file()]
        cover(directory.path, names)
        return committed.round if committed is not None else 0

    def _take_up(self, committed: Committed) -> None:
        self.server.shared = committed.shared
        self.server.since, self.server.counted = committed.server["since"], committed.server["counted"]
        if typical := committed.server.get("typical"):
            self.server.typical = Typical(**typical)
        self.log, self.last, self.earlier = committed.log, committed, committed.server["seconds"]
        as_now = "settings" in committed.server and not any(map(is_scoring, self.changes.get("settings", {})))
        if as_now:  # otherwise these scores do not compare with those to come
            self.scores = {
                name: Scores(**one)
                for name, one in committed.server["scores"].items()
                if name in self.clients.by_name
            }

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
            # Of a round that does not count no client keeps anything.
            replies = {} if why_not else took_part.replies
            kept = {name: reply.kept for name, reply in replies.items() if reply.kept is not None}
            scores: dict[str, Scores] = {}
            unscored: dict[str, Failure] = {}
            if self.scoring.is_due(round):
                bar.scoring(round)
                scores, unscored = self._score(round, kept)
            line = round_line(
                round, why_not, took_part, scores, self._known(), self.server.changes, self.scoring.sample
            )
            if len(self.scoring.sample) < len(self.clients.by_name):
                line["sample"] = sorted(self.scoring.sample)
            line["learning_rate"] = learning_rate(self.config, round)
            if self.changes:
                line["changes"] = self.changes
            if unscored:
                line["unscored"] = {name: str(failure) for name, failure in unscored.items()}
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
                "clients": list(self.clients.by_name),
                "settings": self.settings,
                "typical": self.server.typical._asdict() if self.server.typical is not None else None,
                "scores": {name: one.to_json() for name, one in scores.items()},
                "seconds": _milliseconds(self._seconds()),
            }
            linked.update(write_round(staging, self.last, kept, self.server.shared, server, log))
            self.stop.deferred = True  # from here on the round is as good as committed
        self.last = committed_round(target, round, self.server.shared, server, log)
        self.log, self.scores, self.changes = log, scores, {}
        self._write_log()
        prune(self.directory, round, self.config.federation.keep_rounds)
        self.stop.deferred = False
        if self.stop.signal_number:
            raise self.stop.interrupted(
                f"{self.directory.path}: stopped after round {round}, which is saved,"
            )

    def _exchange(self, round: int, asked: list[str], staging: Path, bar: RoundBar) -> Exchange:
        scored = self.scoring.clients(round)

        def jobs() -> Iterator[Job]:
            for name in asked:
                saved = self.last.state(name) if self.last is not None else None
                yield replace(
                    self._job(name, round, saved),
                    keep=staging / state_file(name),
                    score=name in scored,
                    score_before=name in scored and name not in self._known(),
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
        for name in took_part.failed.keys() - took_part.replies.keys() - self.left_out:
            self.left_out.add(name)  # once: the end sums up
            bar.note(f"round {round}: {name} is left out: {took_part.failed[name][-1]}{self._more_at(name)}")
        if not took_part.replies and not self._may_be_one_clients_fault(asked):
            who = f"all {len(asked)} clients" if len(asked) > 1 else "the one client that was asked"
            raise FederationError(
                f"round {round}: {who} failed, at {1 + self.config.federation.retries} tries each. "
                + " ".join(f"{name}: {reasons[-1]}." for name, reasons in took_part.failed.items())
                + (
                    f" So did the one asked in round {round - 1}, which is skipped."
                    if len(asked) == 1 < len(self.clients.by_name)
                    else ""
                )
                + self._more_at("NAME")
                + (f" Intact: {self.last.folder.name}." if self.last is not None else "")
                + " Fix the cause, then --resume auto."
            )
        return took_part

    def _more_at(self, name: str) -> str:
        """Where the whole error of a client is; what the server rejected it says itself."""
        known = self.clients.by_name if name == "NAME" else [name]
        there = any((self.directory.client(one) / ERRORS).is_file() for one in known)
        return f" Each client's errors are in {self.directory.client(name) / ERRORS}." if there else ""

    def _may_be_one_clients_fault(self, asked: list[str]) -> bool:
        """Whether a round in which all failed says nothing of the others: one was asked, and no other just before."""
        if len(asked) > 1 or len(self.clients.by_name) == 1:
            return False
        last = loads(self.log[-1]) if self.log else {}
        others = last.get("failed", {}).keys() - set(asked)
        trained = any("loss" in one for one in last.get("clients", {}).values())
        return trained or not others

    def _known(self) -> dict[str, Scores]:
        """Scores that the last round's aggregated models had, where a client starts from just these models."""
        return {} if self.config.federation.state == "reset-each-round" else self.scores

    def _score(
        self, round: int, kept: Mapping[str, SavedState]
    ) -> tuple[dict[str, Scores], dict[str, Failure]]:
        """Scores of clients' aggregated models: the new shared state with what the client keeps; and whose failed.

        Args:
            kept: states of the clients that took part in this round, which is in the making.
        """

        def job(name: str) -> Job:
            before = self.last.state(name) if self.last is not None else None
            return self._job(name, round + 1, kept.get(name, before))

        return self.scoring.score(round, job, self.runner, self.experiment, self._more_at)

    def _job(self, name: str, round: int, state: SavedState | None) -> Job:
        """What a client is given for a round."""
        payload = self.server.payload(name, round)
        site = self.directory.client(name)
        return Job(
            name, pack(payload.tensors), round, payload.since, payload.whole, state, site=site,
        )  # fmt: skip

    # ---- the end

    def _finish(self) -> dict[str, Any]:
        """Every client's adapter, and the metrics."""
        if self.server.since == 0:
            needed = self.server.needed()
            raise FederationError(
                f"none of {self.rounds} rounds had the {needed} clients that a round needs (or the quorum), so nothing "
                f"was learned. {self.directory.log} says why clients failed. Fix that, or lower federation.min_clients "
                "or federation.quorum; --resume auto then runs these rounds again."
            )
        assert self.last is not None
        last = self.last
        jobs = (
            replace(
                self._job(name, self.rounds + 1, last.state(name)),
                adapter=self.directory.client(name) / "adapter",
            )
            for name in self.clients.by_name
        )
        for _ in self.runner.run_all(jobs, self.experiment):
            pass
        # A federation that was to have more rounds, or whose scoring has changed since, has not scored its last one.
        scores = self.scores
        if scores.keys() != self.clients.by_name.keys():
            scores, _ = self._score(self.rounds, {})
        metrics = final_metrics(
            self.config.federation.rule, self.clients, self.log, scores, self.references,
            departed={
                name: one for name, one in self.identity["clients"].items() if name not in self.clients.by_name
            },
            changes=self.changes,
        )  # fmt: skip
        metrics["scored_with"] = scored_with(self.clients, self.settings)
        metrics["seconds"] = _milliseconds(self._seconds())
        text = json_text(metrics)
        self._vouch(text.encode())
        atomic_write_text(self.directory.metrics, text)
        return metrics

    def _seconds(self) -> float:
        return self.earlier + time.monotonic() - self.start

    def _write_log(self) -> None:
        atomic_write_text(self.directory.log, "".join(line + "\n" for line in self.log))


def _milliseconds(seconds: float) -> float:
    return round(seconds, 3)
