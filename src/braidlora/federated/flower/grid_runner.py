"""Clients' jobs done at sites that Flower's grid reaches."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from braidlora.config import FederatedConfig
from braidlora.errors import FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.hello import (
    BEGIN,
    Begun,
    Reference,
    Welcome,
    advice,
    base_notes,
    check_base,
    digest,
    form_of_base,
    hello,
    read_answer,
    welcome_problems,
)
from braidlora.federated.flower.jobs import pack_job, unpack_reply
from braidlora.federated.flower.post import INVALID, UNREACHABLE, Post
from braidlora.federated.flower.status import Status
from braidlora.federated.protocol.clients import TrainingClient
from braidlora.federated.protocol.failure import Failure
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.wire import Message, unpack_payload
from braidlora.federated.simulation.rollback import site_followed, sites_behind
from braidlora.federated.simulation.runner import Job, ModelFacts, Reply
from braidlora.models.identity import base_name
from braidlora.runs import FederatedDirectory

REJECTED = Failure("HandshakeRejected", "invalid")
_NAMED = 12  # sites that a line names
_RETURN = (
    "\nIf the server is at an earlier round on purpose, start with --rollback ROUND --resume auto, ROUND its last: "
    "sites then return to it."
)


class GridRunner:
    """Does jobs at sites, all that are given at once.

    A site takes part once the handshake has found no difference; one that connects later is asked before the next
    round.

    Args:
        post: reaches the sites.
        config: the recipe.
        clients: by name.
        remote: whether clients keep their states and results elsewhere than in the run directory.
        accept_fresh: clients that may start from a fresh state although a round of theirs has counted.
        directory: the run directory, which lists the sites that have yet to follow a rollback.

    Attributes:
        welcomes: what the sites said, by name.
    """

    def __init__(
        self,
        post: Post,
        config: FederatedConfig,
        clients: Mapping[str, TrainingClient],
        *,
        remote: bool,
        accept_fresh: Collection[str] = (),
        directory: FederatedDirectory | None = None,
    ) -> None:
        self.remote, self.welcomes = remote, dict[str, Welcome]()
        self._post, self._config, self._clients = post, config, clients
        self._accept_fresh, self._directory = set(accept_fresh), directory
        self._status: Status = post.status
        self._tasks = {task.name for task in config.tasks}
        self._rejected: dict[
            str, str
        ] = {}  # sites that may not take part, and when their nodes had connected
        self._ahead: set[str] = set()  # sites with states of later rounds than the server counts
        self._reference: Reference | None = None
        self._head = b""
        self._server: Server | None = None

    def connect(self, needed: int) -> None:
        """Wait for the sites and settle what must be equal.

        Args:
            needed: how many sites a round needs.

        Raises:
            FederationError: too few sites connected in time, or some differ in what must be equal.
        """
        there = self._wait_for_sites(needed)
        self._status.phase(f"handshake with {len(there)} sites")
        answers = self._welcome(there)
        if self._reference is None:
            raise FederationError(
                "no site answered the handshake: "
                + "; ".join(f"{name}: {answer}" for name, answer in answers.items())
                + ". The full errors are in each site's log."
            )
        problems: dict[str, list[str]] = {
            name: answer for name, answer in answers.items() if isinstance(answer, list)
        }
        if problems:
            lines = [f"  {name}: {text}" for name, found in sorted(problems.items()) for text in found]
            raise FederationError(
                "settings that must be equal differ between sites; nothing was trained.\n"
                + "\n".join(lines)
                + f"\n{advice(problems)}"
            )
        failed = {name: str(answer) for name, answer in answers.items() if isinstance(answer, Failure)}
        for name, why in failed.items():
            self._status.note(f"{name}: no handshake: {why}")
        if len(self.welcomes) < needed:
            raise FederationError(
                f"{len(self.welcomes)} sites participate; a round needs {needed}. "
                + "; ".join(f"{name}: {why}" for name, why in failed.items())
                + ". The full errors are in each site's log."
            )

    def facts(self) -> ModelFacts:
        """Of the model, as the sites have it."""
        assert self._reference is not None, "connect first"
        base = self._reference.base
        if self.remote:  # where a site has it is the site's own business
            base = base.model_copy(update={"path": base_name(self._config.model)})
        return ModelFacts(self._reference.layers, self._head, base, self._reference.sampled)

    def prepare(self, server: Server) -> None:
        """Compare the clients' states with what the server counts, once the experiment is known.

        Raises:
            FederationError: a client's state is lost, older or newer; with both sides' rounds.
        """
        self._server = server
        problems = self._begin(sorted(self.welcomes))
        if problems:
            raise FederationError(
                "clients do not have the states that the server expects; nothing was trained.\n"
                + "\n".join(f"  {name}: {text}" for name, text in sorted(problems.items()))
                + (_RETURN if self._ahead & problems.keys() else "")
                + "\nRestore them from a copy, or let these clients start from a fresh state: --accept-fresh-state "
                + ",".join(sorted(problems))
                + "."
            )

    def run_all(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Every job with its reply, in the order in which they arrive."""
        self._admit()
        given: dict[str, Job] = {}

        def messages() -> Iterator[tuple[str, Envelope]]:
            for job in jobs:
                given[job.client] = job
                if job.client not in self.welcomes:
                    continue
                yield job.client, pack_job(job)

        count = 0
        for name, answer in self._post.ask(messages(), "round"):
            reply = self._reply(given[name], answer)
            count += reply.failure is None
            self._status.answered(name, reply.failure.code if reply.failure is not None else "answered")
            yield given[name], reply
        for name, job in given.items():
            if name not in self.welcomes:
                yield job, Reply(name, failure=REJECTED if name in self._rejected else UNREACHABLE)
        if given:
            first = next(iter(given.values()))
            what = "training" if first.train else "scoring" if first.score else "adapters"
            round = unpack_payload(Message(first.payload.header, b"")).round - (0 if first.train else 1)
            self._status.phase(f"round {round}: {what}: {count} of {len(given)} sites answered", round)

    def run(self, job: Job) -> Reply:
        """Do one job."""
        [(_, reply)] = self.run_all([job])
        return reply

    def close(self) -> None:
        """Nothing to release."""

    def _reply(self, job: Job, answer: Envelope | Failure) -> Reply:
        if isinstance(answer, Failure):
            return Reply(job.client, failure=answer)
        try:
            return unpack_reply(answer, job, self._tasks)
        except FederationError as error:
            self._status.note(f"{job.client}: {error}")
            return Reply(job.client, failure=INVALID)

    def _wait_for_sites(self, needed: int) -> list[str]:
        """The sites that are connected when all are, or after the time for it is over."""
        patience, expected = self._post.patience, sorted(self._clients)
        end, said = time.monotonic() + patience.sites, ""
        while True:
            self._post.check_stop()
            there = self._post.look()
            missing = [name for name in expected if name not in there]
            if not missing:
                return expected
            if (text := waiting_text(missing)) != said:
                said = text
                self._status.phase(text)
            if time.monotonic() >= end:
                break
            time.sleep(min(1.0, patience.poll))
        if len(expected) - len(missing) < needed:
            raise FederationError(
                f"{len(expected) - len(missing)} of {len(expected)} sites connected within {patience.sites:g} s; a "
                f"round needs {needed}. Missing: {', '.join(missing)}. Start `braidlora site join` there."
            )
        self._status.note(f"continuing without {', '.join(missing)}, which may connect later")
        return [name for name in expected if name in there]

    def _welcome(self, names: Collection[str]) -> dict[str, list[str] | Failure]:
        """Ask these sites for the handshake, and admit those without a difference. Returns what is wrong, by name."""
        asked: dict[str, Welcome | Failure] = {}
        question = hello(self._config, send_head=False)
        for name, answer in self._post.ask(((name, question) for name in sorted(names)), "handshake"):
            found: Any = answer
            if isinstance(answer, Envelope):
                try:
                    found = read_answer(answer, Welcome)
                except FederationError as error:
                    self._status.note(f"{name}: {error}")
                    found = INVALID
            asked[name] = found
            outcome = found.code if isinstance(found, Failure) else "answered"
            self._status.answered(name, outcome)
        problems: dict[str, list[str] | Failure] = {}
        valid: dict[str, Welcome] = {}
        for name in sorted(asked):
            welcome = asked[name]
            if isinstance(welcome, Failure):
                problems[name] = welcome
                continue
            try:
                check_base(name, welcome)
            except FederationError as error:
                problems[name] = [str(error)]
                continue
            valid[name] = welcome
        if valid and self._reference is None:
            self._reference = Reference.of_most(valid)
            self._head = self._head_of(self._reference.site, valid[self._reference.site])
        for name, welcome in valid.items():
            assert self._reference is not None
            client = self._clients[name]
            found = welcome_problems(name, client, client.seed, welcome, self._reference)
            notes = base_notes(name, welcome, self._reference)
            if found:
                problems[name] = found
            if not found:
                self.welcomes[name] = welcome
                self._status.welcomed(name, form_of_base(name, welcome))
                for note in notes:
                    self._status.note(f"{name}: {note}")
        return problems

    def _head_of(self, name: str, welcome: Welcome) -> bytes:
        """The initial tensors that are trained in full, from one site; the others have said that theirs are equal."""
        if not welcome.head:
            return b""
        question = hello(self._config, send_head=True)
        for _, answer in self._post.ask([(name, question)], "handshake"):
            if isinstance(answer, Envelope) and digest(answer.tensors) == welcome.head_digest:
                return answer.tensors
        raise FederationError(f"{name}: did not send the initial tensors of its head.")

    def _begin(self, names: Collection[str]) -> dict[str, str]:
        """Compare the states of clients with what the server counts. Returns what is wrong, by name."""
        assert self._server is not None
        state = self._server.state()
        behind = sites_behind(self._directory) if self._directory is not None else set()
        fresh = [name for name in names if name in self._accept_fresh]
        if fresh:
            self._accept_fresh -= set(fresh)
            self._server.forget(fresh)
            state = self._server.state()

        def messages() -> Iterator[tuple[str, Envelope]]:
            for name in names:
                header = {
                    "experiment": state.experiment,
                    "counted": state.counted.get(name, 0),
                    "fresh": name in fresh,
                    "rollback": name in behind and name not in fresh,  # which would delete what is set aside
                }
                yield name, Envelope(BEGIN, header)

        problems = {}
        for name, answer in self._post.ask(messages(), "begin"):
            counted = state.counted.get(name, 0)
            try:
                found = answer if isinstance(answer, Failure) else read_answer(answer, Begun)
            except FederationError as error:
                found = INVALID
                self._status.note(f"{name}: {error}")
            self._status.answered(name, found.code if isinstance(found, Failure) else "answered")
            if isinstance(found, Failure):
                problems[name] = f"{found}; {_counted_text(counted)}; see the site's errors.log"
                if found in (UNREACHABLE,) or found.code == "late":
                    problems.pop(name)
                    self.welcomes.pop(name, None)
                    self._status.note(f"{name}: left before the first round")
                continue
            if found.changed:
                self._status.note(f"{name}: {found.changed}")
            if not _fits(counted, found.committed, found.pending):
                problems[name] = states_text(counted, found)
                self._ahead |= {name} if found.committed > counted else set()
            elif name in behind:
                assert self._directory is not None
                site_followed(self._directory, name)
        return problems

    def _admit(self) -> None:
        """The handshake with sites that have connected since."""
        if self._server is None:
            return
        nodes = self._post.look()
        new = [
            name
            for name in nodes
            if name in self._clients
            and name not in self.welcomes
            and self._rejected.get(name) != nodes[name].last_activated_at
        ]
        if not new:
            return
        problems: dict[str, Any] = dict(self._welcome(new))
        problems |= self._begin([name for name in new if name in self.welcomes])
        for name in new:
            if name not in problems:
                self._rejected.pop(name, None)
                self._status.note(f"{name}: participates from now on")
                continue
            self.welcomes.pop(name, None)
            self._rejected[name] = nodes[name].last_activated_at
            what = problems[name]
            text = "; ".join(what) if isinstance(what, list) else str(what)
            self._status.note(f"{name}: rejected: {text}")


def waiting_text(missing: Sequence[str]) -> str:
    """Which sites are waited for; only the first ones are named if there are many."""
    names = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else "")
    return f"waiting for {len(missing)} site{'' if len(missing) == 1 else 's'}: {names}"


def states_text(counted: int, found: Begun) -> str:
    """The last round of a client that the server has counted, and those whose states its site has."""
    has = f"has round {found.committed} committed" if found.committed else "has no committed round"
    pending = f" and round {found.pending} pending" if found.pending else ""
    return f"{_counted_text(counted)}; the site {has}{pending}"


def _counted_text(counted: int) -> str:
    return (
        f"the server counts round {counted} of this client last"
        if counted
        else "the server has counted no round of this client"
    )


def _fits(counted: int, committed: int, pending: int) -> bool:
    """Whether a client's states are those that the server counts on; as `protocol.settle` judges them."""
    return counted == committed or bool(pending and counted == pending)
