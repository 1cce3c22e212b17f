"""`federate`: a complete federation on this machine, from the recipe to every client's adapter."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from braidlora.config import FederatedConfig, dump_config
from braidlora.errors import ConfigError, FederationError
from braidlora.federated.protocol.accountant import Release, check_accountant, spent
from braidlora.federated.protocol.state import ServerState
from braidlora.federated.simulation.early_layout import copy_states
from braidlora.federated.simulation.final import final_files
from braidlora.federated.simulation.launch import check_launch, follow_federation
from braidlora.federated.simulation.ledger import read_releases
from braidlora.federated.simulation.preview import tasks_of_all
from braidlora.federated.simulation.progress import RoundBar
from braidlora.federated.simulation.results import LocalRun, final_metrics, scored_with
from braidlora.federated.simulation.resume import experiment_id, identity
from braidlora.federated.simulation.resume_from import Start, resume_from
from braidlora.federated.simulation.rounds import Rounds
from braidlora.federated.simulation.runner import Runner
from braidlora.federated.simulation.saved_rounds import prune, roll_back_clients
from braidlora.federated.simulation.workers import JobRunner, Workers
from braidlora.federated.site.clients import Clients, load_clients
from braidlora.federated.site.group import Group
from braidlora.federated.site.scores import Scores
from braidlora.json_text import loads
from braidlora.models.tokenizer import load_tokenizer
from braidlora.processes import launched
from braidlora.runs import (
    MANIFEST,
    FederatedDirectory,
    atomic_write_json,
    atomic_write_text,
    cover,
    covered,
    environment,
    hold,
    json_text,
    refuse_changed,
    warn_of_another_machine,
)
from braidlora.tasks import encode_tasks
from braidlora.tasks.checks import warn_of_lengths, warn_of_prompts, warn_of_rows
from braidlora.tasks.class_weights import class_weights
from braidlora.training.failures import explain_disk_failures
from braidlora.training.stop import StopRequest, stop_requests
from braidlora.training.threads import cpu_threads

# Clients, and what does their jobs, for a recipe and the run directory of its federation.
Connect = Callable[[FederatedConfig, FederatedDirectory, StopRequest], tuple[Clients, JobRunner]]


@dataclass(frozen=True)
class FederationResult:
    """A federation's directory and scores: `metrics` is the content of `metrics.json`.

    Of several processes that torchrun or `accelerate launch` started, the first one has them, and `metrics` is empty in
    the others.
    """

    directory: Path
    metrics: dict[str, Any]


def federate(
    config: FederatedConfig,
    *,
    resume: Literal["auto"] | None = None,
    overwrite: bool = False,
    rollback: int | None = None,
    local_run: Path | None = None,
    progress: bool = True,
    connect: Connect | None = None,
    stop: StopRequest | None = None,
) -> FederationResult:
    """Train the recipe's clients together, and save and score every client's model.

    Args:
        config: the recipe.
        resume: `auto` resumes after the last complete round in the output directory, if there is one. The result is
            that of an uninterrupted federation (bit-exact on a CPU, unless `federation.privacy` draws noise).
        overwrite: remove what an earlier federation left there, once everything needed is loaded.
        rollback: with `resume`, first go back to this round and remove those after it, once everything needed is loaded
            and it is certain that this is the same federation. `simulation.rollback` does only that.
        local_run: directory of a finished federation by rule `local`, against which Δm% is measured.
        progress: show a progress bar on stderr.
        connect: opens the clients, and what does their jobs; default: their rows and base models in this process or in
            `federation.workers` of them.
        stop: a request to stop that another thread listens for; default: this one does, if it is the main thread.

    Raises:
        ConfigError, DataError: the recipe or its data is not usable; nothing has been written.
        CheckpointError: the directory holds another federation, or a round or a client's state is damaged.
        FederationError: all sampled clients failed in a round (if one is sampled: two different ones in a row), or no
            round had enough clients.
        TrainingError: the disk is full or not writable; committed rounds stay.
        Interrupted: SIGTERM or Ctrl-C; the current round is dropped, committed rounds stay.
    """
    if resume is not None and overwrite:
        raise ConfigError(
            "--resume and --overwrite cannot be combined: one continues, the other starts over."
        )
    if rollback is not None and resume is None:
        raise ConfigError(
            "--rollback needs --resume auto here; braidlora.federated.simulation.rollback only goes back."
        )
    if config.federation.privacy is not None:
        check_accountant()
    directory = FederatedDirectory.at(config.output)
    check_launch(config, connect)
    if launched()[0] > 0:
        follow_federation(config)
        return FederationResult(directory.path, {})
    with hold(directory.path):
        with explain_disk_failures(directory):
            directory.restore()
        directory.refuse_to_lose(resume=resume is not None, overwrite=overwrite)
        compared = LocalRun.read(local_run) if local_run is not None else None
        with stop_requests() as own, cpu_threads(config.training.threads):
            request = stop or own
            clients, runner = (connect or _on_this_machine)(config, directory, request)
            try:
                if compared is not None:
                    compared.check(clients)
                with explain_disk_failures(directory):
                    releases = _earlier_releases(directory, config, overwrite)
                    rounds = Rounds(config, directory, clients, runner, request, releases)
                    return _Federation(rounds, compared).run(resume, rollback, progress)
            finally:
                runner.close()


def _earlier_releases(
    directory: FederatedDirectory, config: FederatedConfig, overwrite: bool
) -> list[Release]:
    """What counts in ε from the start; warns of what no longer counts because a new federation takes its place."""
    releases, privacy = read_releases(directory), config.federation.privacy
    if not releases or (privacy is not None and not overwrite):
        return releases
    local = any(one.what == "sent" for one in releases)
    found = spent(releases, privacy.delta if privacy is not None else 1e-5, at_clients=local)
    if not found.why_no_guarantee and found.epsilon is not None:
        warnings.warn(
            f"{directory.path}: an earlier federation there has spent ε = {found.epsilon:.4g} on its rows. What it "
            "released cannot be taken back; the new one adds to it, and counts only itself",
            stacklevel=3,
        )
    return []


_CHECKED = 1000  # rows of a task that are encoded to check the cutoff


def _warn_of_data(config: FederatedConfig, clients: Clients) -> None:
    """Warn of, or reject, what is probably wrong with the rows of all clients together, before the first round."""
    tasks = tasks_of_all(config, clients)
    class_weights(config, tasks, clients.label_space)
    warn_of_rows(tasks, config)
    some = [replace(task, train=task.train[:_CHECKED], validation=[]) for task in tasks]
    tokenizer = load_tokenizer(config.model)
    rows = encode_tasks(some, tokenizer, config.prompt, "train", clients.label_space)
    warn_of_lengths({"train": rows}, config)
    warn_of_prompts(some, tokenizer, config)


def _on_this_machine(
    config: FederatedConfig, directory: FederatedDirectory, stop: StopRequest
) -> tuple[Clients, JobRunner]:
    clients = load_clients(config)
    _warn_of_data(config, clients)
    one = config.federation.workers == 1
    group = Group() if launched()[1] > 1 else None
    return clients, Runner(config, clients, group) if one else Workers(config, clients)


class _Federation:
    """The steps of `federate` once everything is loaded."""

    def __init__(self, rounds: Rounds, local_run: LocalRun | None) -> None:
        self.rounds, self.local_run = rounds, local_run
        self.config, self.directory, self.clients = rounds.config, rounds.directory, rounds.clients
        self.identity = identity(self.config, self.clients, rounds.base)

    def run(self, resume: str | None, rollback: int | None, progress: bool) -> FederationResult:
        """All rounds that are left, then the adapters and the metrics."""
        total = self.config.federation.rounds
        finished = self.directory.state() == "finished" and resume is not None
        text = None
        if finished and rollback is None and self.directory.checkpoint_steps():
            text = self._intact_metrics()
        done = self._begin(resume, rollback)
        if text is not None and done == total and self.local_run is None:
            metrics: dict[str, Any] = loads(text)
            now = scored_with(self.clients, self.rounds.settings)
            if metrics.get("scored_with", now) == now:
                self._cover_results(text)
                return FederationResult(self.directory.path, metrics)
        self.directory.metrics.unlink(missing_ok=True)
        self.rounds.runner.prepare(self.rounds.server)
        sampled = self.config.sampled_per_round(len(self.clients.by_name))
        bar = RoundBar(total, sampled, done, progress)
        try:
            for round in range(done + 1, total + 1):
                bar.begin(round)
                self.rounds.run(round, bar)
        finally:
            bar.close()
        return FederationResult(self.directory.path, self._finish())

    def _intact_metrics(self) -> bytes | None:
        """The metrics of a finished federation whose results are unchanged; None if some are missing.

        Raises:
            CheckpointError: a file has changed since it was written.
        """
        directory, name = self.directory, self.directory.metrics.name
        members = directory.read_json(directory.partition.name)  # a client that joins has no adapter yet
        missing = refuse_changed(
            directory.path,
            [
                directory.client(one) / "adapter"
                for one in self.clients.by_name
                if one in members and not self.rounds.runner.remote
            ],
        )
        for problem in missing:
            warnings.warn(f"recreated from the last round: {problem}", stacklevel=2)
        return directory.read(name) if not missing and name in (covered(directory.path) or {}) else None

    def _cover_results(self, metrics: bytes) -> None:
        """Put all results into the federation's manifest, `metrics.json` before it is written."""
        files = [self.directory.log.name]
        if self.rounds.ledger is not None:
            files.append(self.directory.privacy.name)
        for name in self.directory.client_adapters():
            files += final_files(self.directory, name)
            if self.directory.was_added(name):
                files.append(f"clients/{name}/added.json")
        cover(self.directory.path, files, {self.directory.metrics.name: metrics})

    def _begin(self, resume: str | None, rollback: int | None) -> int:
        """Write what is known before the first round, or restore the last one. Returns the number of rounds done."""
        directory, here = self.directory, environment()
        # Sites may still have states of an earlier federation by the same recipe, so it needs another name than that.
        own = secrets.token_hex(8) if self.rounds.runner.remote else experiment_id(self.identity)
        start = Start(None, own, self.identity)
        if resume is not None:
            start = resume_from(self.rounds, start, rollback)
        last, changes, self.identity = start.last, start.changes, start.identity
        first = directory.read_json(directory.environment.name) if last is not None else {}
        directory.path.mkdir(parents=True, exist_ok=True)
        if last is None:
            # The ledger has rounds that were released and then killed; it must not be gone for a moment.
            known = self.rounds.ledger is not None and self.rounds.ledger.releases
            directory.clear(keep=[directory.privacy.name] if known else [])
        (directory.path / MANIFEST).unlink(missing_ok=True)  # until what it lists is complete again
        # First, for it says that this folder is a federation's, whatever happens next.
        atomic_write_text(directory.config, dump_config(self.config))
        directory.remove_partial()
        self.rounds.server.restore(ServerState(start.experiment))
        if last is not None:
            prune(directory, last.round, self.config.federation.keep_rounds)
            copy_states(directory)
            roll_back_clients(directory, last.state)
            warn_of_another_machine(first, here)
            resumed = {"after": last.round, **({"changes": changes} if changes else {}), **here}
            here = {**first, "resumed": [*first.get("resumed", []), resumed]}
            self.rounds.restore(last, changes)
        atomic_write_json(directory.environment, here)
        atomic_write_json(directory.experiment, {"id": start.experiment, **self.identity})
        atomic_write_json(directory.partition, self.clients.report())
        if numbers := self.clients.row_numbers():
            atomic_write_text(directory.partition_rows, numbers)
        if self.clients.label_space is not None:
            atomic_write_text(directory.labels, self.clients.label_space.to_json())
        self.rounds.write_log()
        names = [name for name in directory.BEGINNING if (directory.path / name).is_file()]
        cover(directory.path, names)
        return last.round if last is not None else 0

    def _finish(self) -> dict[str, Any]:
        """Write every client's adapter, and the metrics."""
        rounds, total = self.rounds, self.config.federation.rounds
        if rounds.server.state().shared_round == 0:
            needed = rounds.server.needed()
            raise FederationError(
                f"none of {total} rounds had the {needed} clients that a round needs (or the quorum), so nothing was "
                f"learned. {self.directory.log} says why clients failed. Fix that, or lower federation.min_clients or "
                "federation.quorum; --resume auto then runs these rounds again."
            )
        jobs = (
            replace(rounds.job(name, total + 1), save_adapter=True)
            for name in self.clients.by_name
            if name not in rounds.adapters
        )
        for _ in rounds.runner.run_all(jobs):
            pass
        # The last round may not be scored: rounds were taken off the recipe, or the scoring has changed.
        scores = rounds.scores
        if scores.keys() | rounds.unscored != self.clients.by_name.keys():
            scores, _ = rounds.score(total)
        scores = {name: scores.get(name, Scores({}, {})) for name in self.clients.by_name}
        known = self.identity["clients"]
        departed = {name: one for name, one in known.items() if name not in self.clients.by_name}
        metrics = final_metrics(
            self.config.federation.rule, self.clients, rounds.log, scores, self.local_run,
            departed=departed, changes=rounds.changes,
        )  # fmt: skip
        if rounds.unscored:  # sites that were not there at the end
            metrics["unscored"] = sorted(rounds.unscored)
        metrics["scored_with"] = scored_with(self.clients, rounds.settings)
        if rounds.ledger is not None:
            metrics["privacy"] = rounds.ledger.report()
        metrics["seconds"] = rounds.seconds()
        text = json_text(metrics)
        self._cover_results(text.encode())
        atomic_write_text(self.directory.metrics, text)
        return metrics
