"""Clients' jobs in several processes, each with a base of its own. The replies have the bytes of a single process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from braidlora.config import FederatedConfig
from braidlora.errors import TrainingError
from braidlora.federated.simulation.runner import Job, ModelFacts, Reply, Runner
from braidlora.federated.site.clients import Clients


class Workers:
    """Does jobs as a `Runner` does, some at a time.

    Args:
        config: the recipe; `federation.workers` says how many processes.
        clients: who may be named in jobs.

    Raises:
        TrainingError: a process died.
        BraidloraError: what a process could not load.
    """

    def __init__(self, config: FederatedConfig, clients: Clients) -> None:
        number = config.federation.workers
        context = multiprocessing.get_context("spawn")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(number)
        try:
            # As many threads as here, since sums depend on their number.
            self._workers = [
                _Worker(context, (config, clients, torch.get_num_threads())) for _ in range(number)
            ]
            for worker in self._workers:
                self._facts: ModelFacts = worker.hear()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def facts(self) -> ModelFacts:
        """Of the model."""
        return self._facts

    def run_all(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Reply]]:
        """Every job with its reply, in the order of the jobs."""
        pending: deque[tuple[Job, Future[Reply]]] = deque()
        for job in jobs:
            pending.append((job, self._threads.submit(self.run, job)))
            if len(pending) > 2 * len(self._workers):  # more would only fill the memory
                job, future = pending.popleft()
                yield job, future.result()
        for job, future in pending:
            yield job, future.result()

    def run(self, job: Job) -> Reply:
        """Do a job in the next process that is free; raises what `Runner.run` raises there."""
        worker = self._idle.get()
        try:
            reply: Reply = worker.ask(job)
            return reply
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.join()


class _Worker:
    def __init__(self, context: Any, given: tuple[FederatedConfig, Clients, int]) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *given), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, message: Any) -> Any:
        """The answer to a message; raises what was raised over there, or TrainingError where nobody is left."""
        with contextlib.suppress(OSError):  # it has ended, which `hear` tells
            self.connection.send(message)
        return self.hear()

    def hear(self) -> Any:
        try:
            reply = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise TrainingError(
                f"a worker process ended with exit code {self.process.exitcode}; a negative one is the signal that "
                "killed it, as when memory runs out. Lower federation.workers, then --resume auto."
            ) from None
        if isinstance(reply, Exception):
            raise reply
        return reply


def _serve(connection: Connection, config: FederatedConfig, clients: Clients, threads: int) -> None:
    """What a process does: load a base, then a job for every message, until it is ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        runner = Runner(config, clients)
        connection.send(runner.facts())
        while True:
            job = connection.recv()
            try:
                connection.send(runner.run(job))
            except Exception as error:  # raised again over there
                connection.send(error)
    except EOFError:
        return  # nobody listens any more
    except Exception as error:
        connection.send(error)


def _end_with_parent() -> None:
    """End this process, whatever it is at, when the one that started it was killed.

    Otherwise it would train on, hold the memory that a resumed federation needs, and write into the round that the
    other is making.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
