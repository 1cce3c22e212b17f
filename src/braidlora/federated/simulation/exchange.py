"""One round's exchange with the sampled clients: jobs out, updates in, retries of what may succeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from braidlora.errors import FederationError
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.wire import unpack_update
from braidlora.federated.simulation.runner import Job, Reply
from braidlora.federated.simulation.workers import JobRunner

# A client's training is a function of its payload, its state and its seed: any other failure would only repeat itself.
# The job of a lost worker is retried by the pool.
TRANSIENT = ("out-of-memory", "disk")


@dataclass
class Exchange:
    """The result of an exchange.

    Args:
        replies: of the clients whose update counts, by name, without their updates.
        rows: by client, the training rows behind those updates.
        failed: by client, why each of its tries failed; such a client is left out unless a later try succeeded.
        codes: the stable codes of those reasons: that of the client's `Failure`, `rejected`, or `outlier` if its
            change is out of proportion to the others'.
        up, down: bytes transferred, by client, including those of failed tries.
    """

    replies: dict[str, Reply] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)
    codes: dict[str, list[str]] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)


def exchange(
    server: Server,
    runner: JobRunner,
    jobs: Iterable[Job],
    *,
    retries: int,
    on_reply: Callable[[Reply, int], None],
) -> Exchange:
    """Run every job, have the server judge its update, and reject outliers in the end.

    Args:
        server: with a round open.
        jobs: one per client, in the order of their names.
        retries: how often a client is retried after a transient failure.
        on_reply: called with every client's last reply, and the bytes that its tries transferred.
    """
    result = Exchange()
    for job, reply in runner.run_all(jobs):
        for left in range(retries, -1, -1):
            result.down[job.client] = result.down.get(job.client, 0) + len(job.payload.tensors)
            uploaded = len(reply.update.tensors) if reply.update is not None else 0
            result.up[job.client] = result.up.get(job.client, 0) + uploaded
            if reply.failure is not None:
                problem, code = str(reply.failure), reply.failure.code
            else:
                problem, code = _rejection(server, result, job, reply), "rejected"
            if not problem:
                # The server holds the update now; kept here as well, memory would grow with the clients.
                result.replies[job.client] = replace(reply, update=None)
                break
            result.failed.setdefault(job.client, []).append(problem)
            result.codes.setdefault(job.client, []).append(code)
            if not left or code not in TRANSIENT:
                break
            reply = runner.run(job)
        on_reply(reply, result.down[job.client] + result.up[job.client])
    for client, why in server.settle().items():
        result.failed.setdefault(client, []).append(why)
        result.codes.setdefault(client, []).append("outlier")
        del result.replies[client]
    for found in (result.replies, result.rows, result.failed, result.codes, result.up, result.down):
        _sort(found)  # replies come in any order, and the log is in the order of names
    return result


def _sort(found: dict[str, Any]) -> None:
    ordered = sorted(found.items())
    found.clear()
    found.update(ordered)


def _rejection(server: Server, result: Exchange, job: Job, reply: Reply) -> str:
    """Why the server rejects an update; empty if it takes it."""
    assert reply.update is not None
    try:
        update = unpack_update(reply.update)
        if update.client != job.client:
            return f"client {job.client!r} replied in the name of {update.client!r}"
        server.take(update)
    except FederationError as error:
        return str(error)
    result.rows[job.client] = update.num_examples
    return ""
