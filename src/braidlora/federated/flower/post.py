"""Sends messages to sites over Flower's grid and collects the answers, until a deadline, however sites come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from braidlora.errors import BraidloraError, FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.jobs import JOB
from braidlora.federated.flower.names import Names
from braidlora.federated.flower.status import Status
from braidlora.federated.protocol.failure import Failure
from braidlora.training.stop import StopRequest

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.serverapp import Grid

T = TypeVar("T")
LATE, UNREACHABLE = Failure("Deadline", "late"), Failure("Unreachable", "unreachable")
INVALID, FLOWER = Failure("InvalidAnswer", "invalid"), Failure("ClientAppError", "internal")
_LOOK = 3.0  # seconds between looks at which nodes are connected


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds.

    Args:
        deadline: for all answers to a message.
        absence: for a site that is not connected to come back, before the deadline.
        sites: for sites to connect before the first round.
        poll: between two looks for answers.
    """

    deadline: float = 3600.0
    absence: float = 120.0
    sites: float = 600.0
    poll: float = 1.0


@dataclass
class _Waiting:
    """A site whose answer is awaited.

    Args:
        envelope: what it was asked.
        activated: when its node had connected, as of the last sending; None if it was not sent.
        absent_since: since when its node has not been connected; None if it is.
    """

    envelope: Envelope
    activated: str | None = None
    absent_since: float | None = None


@dataclass
class Post:
    """Messages to sites, by name.

    Args:
        grid: Flower's.
        stop: the user's request to stop, looked at while waiting.
        patience: how long to wait.
        names: says which site a node is.
        status: told what is going on.
    """

    grid: Grid
    stop: StopRequest
    patience: Patience
    names: Names
    status: Status
    nodes: dict[str, NodeInfo] = field(default_factory=dict)
    _looked: float = 0.0

    def look(self) -> Mapping[str, NodeInfo]:
        """The nodes that are connected now, by site."""
        found = self.names.of(_reached(self.grid.get_nodes))
        self.nodes, self._looked = found, time.monotonic()
        self.status.connected(found)
        return found

    def check_stop(self) -> None:
        """Raise if the user wants to stop."""
        if self.stop.signal_number:
            raise self.stop.interrupted("stopped while waiting for sites")

    def ask(
        self, messages: Iterable[tuple[str, Envelope]], group: str, deadline: float | None = None
    ) -> Iterator[tuple[str, Envelope | Failure]]:
        """Send each site its message, and yield the answers as they come; one for each site.

        A message is sent again if its site has restarted since, or has come back. That does no harm: the answer to the
        same message is the same, and only the first one is taken.

        Args:
            group: shown in Flower's logs, such as the round.
            deadline: seconds from now.

        Raises:
            FederationError: the SuperLink does not answer.
            Interrupted: the user wants to stop.
        """
        end = time.monotonic() + (self.patience.deadline if deadline is None else deadline)
        waiting: dict[str, _Waiting] = {}
        sent: dict[str, str] = {}  # site by id of the message
        self.look()
        for name, envelope in messages:
            waiting[name] = _Waiting(envelope)
            self.status.asked(name)
            self._send(name, waiting[name], sent, group, end)
        while waiting:
            self.check_stop()
            answered = False
            for name, answer in self._pull(sent):
                if name not in waiting:
                    continue  # the second answer of a site that was asked twice
                if answer is None:  # Flower lost it, or the node: to be sent again when the node is there
                    waiting[name].activated = None
                    continue
                answered = True
                del waiting[name]
                yield name, answer
            now = time.monotonic()
            if now >= end:
                break
            if waiting and now - self._looked >= _LOOK:
                self.look()
                for name in list(waiting):
                    if self._send(name, waiting[name], sent, group, end):
                        del waiting[name]
                        yield name, UNREACHABLE
            if waiting and not answered:
                time.sleep(self.patience.poll)
        for name in sorted(waiting):
            yield name, LATE

    def _send(self, name: str, one: _Waiting, sent: dict[str, str], group: str, end: float) -> bool:
        """Send a message unless the node has it; returns whether the node has been away for too long."""
        node, now = self.nodes.get(name), time.monotonic()
        if node is None:
            one.absent_since = now if one.absent_since is None else one.absent_since
            return now - one.absent_since > self.patience.absence
        one.absent_since = None
        if one.activated == node.last_activated_at:
            return False
        from flwr.app import Message

        kind = "query" if one.envelope.kind != JOB else "train"
        left = max(1.0, end - now)
        message = Message(one.envelope.to_record(), node.node_id, kind, ttl=left, group_id=group)
        for number in _reached(lambda: self.grid.push_messages([message])):
            if number is not None:
                sent[str(number)] = name
                one.activated = node.last_activated_at
        return False

    def _pull(self, sent: dict[str, str]) -> Iterator[tuple[str, Envelope | Failure | None]]:
        """Answers that have arrived; None for one that will not come."""
        if not sent:
            return
        for message in _reached(lambda: self.grid.pull_messages(list(sent))):
            name = sent.pop(message.metadata.reply_to_message_id, None)
            if name is None:
                continue
            if message.has_error():
                yield name, _failure(message.error.code)
                continue
            try:
                yield name, Envelope.from_record(message.content)
            except FederationError as error:
                self.status.note(f"{name}: {error}")
                yield name, INVALID


def _failure(code: int) -> Failure | None:
    from flwr.common.constant import ErrorCode

    raised = (
        ErrorCode.UNKNOWN, ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ErrorCode.CLIENT_APP_RAISED_EXCEPTION,
        ErrorCode.INVALID_FAB,
    )  # fmt: skip
    return FLOWER if code in raised else None


def _reached(call: Callable[[], Iterable[T]]) -> list[T]:
    """The result of a call to the SuperLink."""
    try:
        return list(call())
    except BraidloraError:  # the user stops it
        raise
    except Exception as error:
        raise FederationError(
            f"the SuperLink does not answer ({type(error).__name__}). Committed rounds are intact: start it again, "
            "then --resume auto continues."
        ) from error
