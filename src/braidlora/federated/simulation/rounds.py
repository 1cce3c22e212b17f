"""One round: exchange with the clients, aggregate, score, commit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from braidlora.config import FederatedConfig
from braidlora.errors import FederationError
from braidlora.federated.protocol.accountant import Release
from braidlora.federated.protocol.client import hides_from_server
from braidlora.federated.protocol.failure import Failure
from braidlora.federated.protocol.schedule import learning_rate
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.state import ServerState
from braidlora.federated.protocol.wire import pack_message, unpack
from braidlora.federated.simulation.exchange import TRANSIENT, Exchange, exchange
from braidlora.federated.simulation.ledger import Ledger, begun_with
from braidlora.federated.simulation.progress import RoundBar
from braidlora.federated.simulation.results import round_line
from braidlora.federated.simulation.resume import is_scoring, rounds_may_change, settings
from braidlora.federated.simulation.runner import Job, Reply
from braidlora.federated.simulation.saved_rounds import SavedRound, prune, write_round
from braidlora.federated.simulation.spool import Spool
from braidlora.federated.simulation.workers import JobRunner
from braidlora.federated.site.clients import Clients
from braidlora.federated.site.errors import ERRORS
from braidlora.federated.site.scores import Scores, scored_clients
from braidlora.json_text import loads
from braidlora.runs import FederatedDirectory, atomic_write_text, commit_directory
from braidlora.training.stop import StopRequest


class Rounds:
    """Runs rounds one after the other, each from the one before.

    Clients hold their new states in their own stores first, then the round commits with what counted; so a kill at any
    moment leaves stores that settle by the last committed round.

    Args:
        config: the recipe.
        directory: where rounds are committed.
        clients: all clients.
        runner: runs their jobs.
        stop: the user's request to stop, which is obeyed between jobs.
        releases: of a private federation that continues.

    Attributes:
        base, sampled: the record of the base model, and its fingerprint as of braidlora 0.1.
        settings: those whose changes rounds.jsonl notes.
        server: the server.
        ledger: of `federation.privacy`; None without it.
        log: the lines of rounds.jsonl.
        last: the last committed round.
        scores: of the aggregated models after it, if it was scored.
        unscored: clients at sites that could not be scored after the last round.
        adapters: clients that have written their final adapter along with the last score.
        changes: what has changed since, to be noted in the next round.
    """

    def __init__(
        self,
        config: FederatedConfig,
        directory: FederatedDirectory,
        clients: Clients,
        runner: JobRunner,
        stop: StopRequest,
        releases: Sequence[Release] = (),
    ) -> None:
        self.config, self.directory, self.clients, self.runner = config, directory, clients, runner
        facts = runner.facts()
        self.base, self.sampled, self.settings = facts.base, facts.sampled, settings(config)
        self._stop, self._updates = stop, Spool()
        head = unpack(facts.head)
        self.server = Server(
            config, clients.by_name, facts.layers, head, held=self._updates,
            noise_multiplier=begun_with(config, releases) if directory.checkpoint_steps() else None,
        )  # fmt: skip
        section, mechanism = config.federation.privacy, self.server.mechanism
        self.ledger: Ledger | None = None
        if section is not None and mechanism is not None:
            self.ledger = Ledger(directory, section, mechanism, releases, rounds_may_change(config))
        # The clients that are scored in every scored round; after the last round all are.
        self._sample = scored_clients(clients.by_name, config.federation.evaluate_sample, config.seed)
        self.log: list[str] = []
        self.last: SavedRound | None = None
        self.scores: dict[str, Scores] = {}
        self.unscored: set[str] = set()
        self.adapters: set[str] = set()
        self.changes: dict[str, Any] = {}
        self._ever_left_out: set[str] = set()
        self._seconds_before, self._start = 0.0, time.monotonic()

    def restore(self, last: SavedRound, changes: dict[str, Any]) -> None:
        """Continue after a committed round."""
        self.server.restore(last.state)
        if self.ledger is not None:
            self.ledger.check(last.record.get("releases", 0))
        self.log, self.last, self.changes = last.log, last, changes
        self._seconds_before = last.record["seconds"]
        # Scores that were made in another way do not compare with those to come.
        if "settings" in last.record and not any(map(is_scoring, changes.get("settings", {}))):
            self.scores = {
                name: Scores(**one)
                for name, one in last.record["scores"].items()
                if name in self.clients.by_name
            }

    def run(self, round: int, bar: RoundBar) -> None:
        """Run a round and commit it.

        Raises:
            FederationError: all clients failed, or the round would exceed the privacy budget; nothing is committed.
            Interrupted: the user stops the federation; the round is dropped, or finished if it was being committed.
        """
        start, sampled = time.monotonic(), self.server.sample(round)
        with commit_directory(self.directory.checkpoint(round)) as staging:
            with self._updates.use(staging / "updates"):
                self.server.open(round, sampled)
                if self.ledger is not None:
                    self.ledger.begin(round, sampled)
                result = self._exchange(round, sampled, bar)
                if self.ledger is not None:
                    self.ledger.release(round, result.replies)
                why_not = self.server.close()
            scores: dict[str, Scores] = {}
            unscored: dict[str, Failure] = {}
            if self._scored(round):
                bar.scoring(round)
                scores, unscored = self.score(round)
            line = self._line(round, why_not, result, scores, unscored)
            line["timing"] = {
                "seconds": _milliseconds(time.monotonic() - start),
                "clients": {name: _milliseconds(reply.seconds) for name, reply in result.replies.items()},
            }
            log = [*self.log, json.dumps(line, ensure_ascii=False, allow_nan=False)]
            state = self.server.state()
            record = self._record(round, state, scores)
            write_round(staging, state, record, log)
            self._stop.deferred = True  # from here on the round is as good as committed
        self.last = SavedRound(round, state, record, log)
        self.log, self.scores, self.changes = log, scores, {}
        self.write_log()
        prune(self.directory, round, self.config.federation.keep_rounds)
        self._stop.deferred = False
        if self._stop.signal_number:
            raise self._stop.interrupted(
                f"{self.directory.path}: stopped after round {round}, which is saved,"
            )

    def score(self, round: int) -> tuple[dict[str, Scores], dict[str, Failure]]:
        """Scores of clients' aggregated models after a round: the shared state with what each client keeps.

        Returns:
            the scores, and the failures of clients that could not be scored.

        Raises:
            FederationError: after the last round a client cannot be scored.
        """
        scored, last = self._scored(round), round == self.config.federation.rounds
        jobs = (
            replace(
                self.job(name, round + 1),
                score=True,
                save_predictions=last,
                save_adapter=last and self.runner.remote,  # one message less to each site
            )
            for name in self.clients.by_name
            if name in scored
        )
        scores, failed = {}, {}
        self.adapters.clear()
        for job, reply in self.runner.run_all(jobs):
            for _ in range(self.config.federation.retries):
                if reply.failure is None or reply.failure.code not in TRANSIENT:
                    break
                reply = self.runner.run(job)
            if reply.scores is not None:
                scores[job.client] = reply.scores
                self.adapters |= {job.client} if job.save_adapter else set()
            elif reply.failure is not None:
                failed[job.client] = reply.failure
        if last and self.runner.remote and scores:
            self.unscored = set(failed)
        elif failed and last:
            raise FederationError(
                "the final models cannot be scored: "
                + ", ".join(f"{name}: {failure}" for name, failure in failed.items())
                + f".{self._see_also('NAME')} Fix the cause, then --resume auto."
            )
        return dict(sorted(scores.items())), dict(sorted(failed.items()))

    def job(self, name: str, round: int) -> Job:
        """A client's job with its payload of a round."""
        return Job(name, self.directory.client(name), pack_message(self.server.payload(name, round)))

    def seconds(self) -> float:
        """How long the federation has run, including before it was resumed."""
        return _milliseconds(self._seconds_before + time.monotonic() - self._start)

    def write_log(self) -> None:
        """Write rounds.jsonl."""
        atomic_write_text(self.directory.log, "".join(line + "\n" for line in self.log))

    def _scored(self, round: int) -> set[str]:
        """The clients that are scored in a round: none, the sample, or after the last one all."""
        federation = self.config.federation
        if round == federation.rounds:
            return set(self.clients.by_name)
        due = federation.evaluate_every > 0 and round % federation.evaluate_every == 0
        return self._sample if due else set()

    def _exchange(self, round: int, sampled: list[str], bar: RoundBar) -> Exchange:
        scored, known = self._scored(round), self._known()

        def jobs() -> Iterator[Job]:
            for name in sampled:
                yield replace(
                    self.job(name, round),
                    train=True,
                    score=name in scored,
                    score_before=name in scored and name not in known,
                )

        def on_reply(reply: Reply, transferred: int) -> None:
            bar.advance(reply, transferred)
            if self._stop.signal_number:  # a library may have swallowed the exception
                raise self._stop.interrupted(
                    f"{self.directory.path}: stopped in round {round}, which is discarded,"
                )

        retries = self.config.federation.retries
        result = exchange(self.server, self.runner, jobs(), retries=retries, on_reply=on_reply)
        for name in result.failed.keys() - result.replies.keys() - self._ever_left_out:
            self._ever_left_out.add(name)  # noted once: the summary at the end has the rest
            bar.note(f"round {round}: {name} is left out: {result.failed[name][-1]}{self._see_also(name)}")
        if sampled and not result.replies and not self._may_be_one_clients_fault(sampled):
            raise self._all_failed(round, sampled, result)
        return result

    def _all_failed(self, round: int, sampled: list[str], result: Exchange) -> FederationError:
        alone = len(sampled) == 1
        return FederationError(
            f"round {round}: {'the one client that was sampled' if alone else f'all {len(sampled)} clients'} failed. "
            + " ".join(
                f"{name}: {reasons[-1]}{f' ({len(reasons)} tries)' if len(reasons) > 1 else ''}."
                for name, reasons in result.failed.items()
            )
            + (
                f" So did the one sampled in round {round - 1}, which is skipped."
                if alone and len(self.clients.by_name) > 1
                else ""
            )
            + self._see_also("NAME")
            + (
                f" Intact: {self.directory.checkpoint(self.last.round).name}."
                if self.last is not None
                else ""
            )
            + " Fix the cause, then --resume auto."
        )

    def _see_also(self, name: str) -> str:
        """Where the full errors of a client are, if it has any; the server reports by itself what it rejected."""
        known = self.clients.by_name if name == "NAME" else [name]
        there = any((self.directory.client(one) / ERRORS).is_file() for one in known)
        return f" Each client's errors are in {self.directory.client(name) / ERRORS}." if there else ""

    def _may_be_one_clients_fault(self, sampled: list[str]) -> bool:
        """Whether a failed round says nothing about other clients: one was sampled, and no other just before."""
        if len(sampled) > 1 or len(self.clients.by_name) == 1:
            return False
        last = loads(self.log[-1]) if self.log else {}
        others = last.get("failed", {}).keys() - set(sampled)
        trained = any("loss" in one for one in last.get("clients", {}).values())
        return trained or not others

    def _known(self) -> dict[str, Scores]:
        """Scores of the last round's aggregated models, if clients start from exactly these models."""
        return {} if self.config.federation.state == "reset-each-round" else self.scores

    def _line(
        self,
        round: int,
        why_not: str,
        result: Exchange,
        scores: dict[str, Scores],
        unscored: dict[str, Failure],
    ) -> dict[str, Any]:
        """A line of rounds.jsonl, without the timing."""
        rows_known = self.ledger is None or not hides_from_server(self.config)
        line = round_line(
            round,
            why_not,
            result,
            scores,
            self._known(),
            self.server.changes,
            self._sample,
            rows_known=rows_known,
        )
        if len(self._sample) < len(self.clients.by_name):
            line["sample"] = sorted(self._sample)
        line["learning_rate"] = learning_rate(self.config, round)
        if self.ledger is not None:
            clipped = self.server.clipped
            line["privacy"] = self.ledger.report() | ({} if clipped is None else {"clipped": clipped})
        if self.changes:
            line["changes"] = self.changes
        if unscored:
            line["unscored"] = {name: str(failure) for name, failure in unscored.items()}
        return line

    def _record(self, round: int, state: ServerState, scores: dict[str, Scores]) -> dict[str, Any]:
        """The content of server.json."""
        return {
            "experiment": state.experiment,
            "round": round,
            "since": state.shared_round,
            "counted": dict(state.counted),
            "clients": list(self.clients.by_name),
            "settings": self.settings,
            "typical": state.typical._asdict() if state.typical is not None else None,
            "weights": dict(state.weights),
            "scores": {name: one.to_json() for name, one in scores.items()},
            "seconds": self.seconds(),
            **({"releases": len(self.ledger.releases)} if self.ledger is not None else {}),
            **({"remote": True} if self.runner.remote else {}),
        }


def _milliseconds(seconds: float) -> float:
    return round(seconds, 3)
