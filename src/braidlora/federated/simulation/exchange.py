"""One round's exchange with the clients that were asked: jobs out, updates in, a second try for who failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from braidlora.errors import FederationError
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation.runner import Job, JobRunner, Reply


@dataclass
class Exchange:
    """What came of it.

    Args:
        replies: of the clients whose update counts, by name, without their uploads.
        failed: why each try of a client failed, by name; such a client is left out unless a later try succeeded.
        codes: the stable codes beside those reasons: that of a client's `Failure`, `rejected`, or `outlier` where its
            change is out of all proportion to the others'.
        up, down: bytes that travelled, by client, those of failed tries included.
    """

    replies: dict[str, Reply] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)
    codes: dict[str, list[str]] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)


def exchange(
    server: Server,
    runner: JobRunner,
    jobs: Iterable[Job],
    experiment: str,
    *,
    retries: int,
    heard: Callable[[Reply, int], None],
) -> Exchange:
    """Have every job done, its update judged and taken by the server, and those left out that stand apart in the end.

    Args:
        server: with a round open.
        jobs: one per client, in the order of their names.
        retries: how often a client that failed, or whose update was rejected, is asked again.
        heard: told of every client that is through, with the bytes it was sent.
    """
    result = Exchange()
    for job, reply in runner.run_all(jobs, experiment):
        for left in range(retries, -1, -1):
            result.down[job.client] = result.down.get(job.client, 0) + len(job.payload)
            result.up[job.client] = result.up.get(job.client, 0) + len(reply.upload)
            problem = str(reply.failure) if reply.failure is not None else _rejection(server, job, reply)
            if not problem:
                # The upload is held as an update now; kept here as well, memory would grow with the clients.
                result.replies[job.client] = replace(reply, upload=b"")
                break
            result.failed.setdefault(job.client, []).append(problem)
            code = reply.failure.code if reply.failure is not None else "rejected"
            result.codes.setdefault(job.client, []).append(code)
            if left:
                reply = runner.run(job, experiment)
        heard(reply, result.down[job.client])
    for client, why in server.settle().items():
        result.failed.setdefault(client, []).append(why)
        result.codes.setdefault(client, []).append("outlier")
        del result.replies[client]
    return result


def _rejection(server: Server, job: Job, reply: Reply) -> str:
    """Why the server does not take an update; empty where it does."""
    assert reply.terms is not None
    if reply.terms.client != job.client:
        return f"client {job.client!r} replied in the name of {reply.terms.client!r}"
    try:
        server.take(reply.update())
    except FederationError as error:
        return str(error)
    return ""
