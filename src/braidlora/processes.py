"""Jobs in several worker processes. The replies are those of one process doing the jobs one after another."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from braidlora.errors import BraidloraError, TrainingError
from braidlora.noise import plain_warnings, quiet_libraries

State = TypeVar("State")
Given = TypeVar("Given")
Reply = TypeVar("Reply")


def launched() -> tuple[int, int]:
    """The number of this process and of how many that torchrun or `accelerate launch` started; (0, 1) without them."""
    if "LOCAL_RANK" not in os.environ:  # some schedulers set the others for processes of their own
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class WorkerLost(TrainingError):  # noqa: N818 (says what happened)
    """A worker process ended in the middle of a job. The pool starts another one for the next job."""


class Pool(Generic[State]):
    """Worker processes that each hold a state and do one job at a time: a function of the state and the job.

    A worker is a fresh interpreter (a fork would inherit torch's threads and cannot use CUDA). It ends when this
    process ends, even by SIGKILL, and ignores the terminal's Ctrl-C: the process that started it decides.

    Args:
        number: of processes.
        start: makes a worker's state from `given`, in the worker; both are pickled.
        given: arguments of `start`.
        saves: a job saves its progress on SIGTERM. `close` then sends one and waits; otherwise it kills the workers.
        retries: how often a job is given to another worker after its worker was lost.
        remedy: ends the message about a lost worker.

    Raises:
        WorkerLost: a process died while it started.
        Exception: whatever `start` raised.
    """

    def __init__(
        self,
        number: int,
        start: Callable[..., State],
        given: tuple[Any, ...] = (),
        *,
        saves: bool = False,
        retries: int = 0,
        remedy: str,
    ) -> None:
        self._number, self._saves, self._retries = number, saves, retries
        self._arguments = (start, given, saves, remedy)
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()  # None: to be started
        self._workers: set[_Worker] = set()
        self._threads = ThreadPoolExecutor(number)
        self._closed = False
        try:
            for worker in [self._start() for _ in range(number)]:  # all start at the same time
                worker.receive()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[[State, Given], Reply], job: Given) -> Reply:
        """Do one job in the next idle worker.

        Raises:
            WorkerLost: the worker died, and so did those of all retries.
            Exception: whatever the function raised there.
        """
        for _ in range(self._retries):
            try:
                return self._run(function, job)
            except WorkerLost:
                if self._closed:
                    raise
        return self._run(function, job)

    def _run(self, function: Callable[[State, Given], Reply], job: Given) -> Reply:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start()
                worker.receive()
            reply: Reply = worker.ask((function, job))
            return reply
        except WorkerLost:
            self._workers.discard(worker)
            worker = None
            raise
        finally:
            self._idle.put(worker)

    def in_order(
        self, function: Callable[[State, Given], Reply], jobs: Iterable[Given]
    ) -> Iterator[tuple[Given, Reply]]:
        """Every job with its reply, in the order of the jobs; few are read ahead, since they take memory."""
        pending: deque[tuple[Given, Future[Reply]]] = deque()
        for job in jobs:
            pending.append((job, self._threads.submit(self.run, function, job)))
            if len(pending) > 2 * self._number:
                job, future = pending.popleft()
                yield job, future.result()
        for job, future in pending:
            yield job, future.result()

    def as_completed(
        self, function: Callable[[State, Given], Reply], jobs: Iterable[Given]
    ) -> Iterator[tuple[Given, Reply]]:
        """Every job with its reply, as soon as it is there."""
        futures = {self._threads.submit(self.run, function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def close(self) -> None:
        """End the workers; with `saves`, once their jobs have saved. A second signal kills them."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        idle = [self._idle.get() for _ in range(self._idle.qsize())]
        try:
            for worker in idle:
                if worker is not None:
                    worker.connection.close()  # its process ends by itself and releases what it holds
                self._idle.put(worker)  # a job that is about to take it finds it lost
            for worker in self._workers.difference(idle):
                worker.process.terminate() if self._saves else worker.process.kill()
            self._threads.shutdown(wait=True)
            for worker in list(self._workers):
                worker.connection.close()
                worker.process.join()
        finally:
            for worker in list(self._workers):
                worker.process.kill()

    def __enter__(self) -> Pool[State]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> _Worker:
        if self._closed:
            raise RuntimeError("the pool is closed")
        worker = _Worker(*self._arguments)
        self._workers.add(worker)
        if self._closed:  # in the meantime
            worker.process.kill()
        return worker


class _Worker:
    def __init__(self, start: Callable[..., Any], given: tuple[Any, ...], saves: bool, remedy: str) -> None:
        self._remedy = remedy
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, start, given, saves), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, message: Any) -> Any:
        with contextlib.suppress(OSError):  # the worker has ended, which `receive` reports
            self.connection.send(message)
        return self.receive()

    def receive(self) -> Any:
        try:
            reply, error, trace = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise WorkerLost(
                f"a worker process ended with exit code {self.process.exitcode} (a negative code is the signal that "
                f"killed it). The usual cause is running out of memory. {self._remedy}"
            ) from None
        if error is not None:
            raise error from (None if isinstance(error, BraidloraError) else _InWorker(trace))
        return reply


class _InWorker(Exception):  # noqa: N818 (shown as the cause, for its traceback)
    def __str__(self) -> str:
        return f"in a worker process\n{self.args[0]}"


def _serve(connection: Connection, start: Callable[..., Any], given: tuple[Any, ...], saves: bool) -> None:
    """A worker's life: make the state, then do one job per message, until the pool closes the pipe."""
    if os.name != "nt":
        os.setpgrp()  # a terminal sends Ctrl-C to the entire group, and a second one would cut a save short
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not saves:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager sends it to every process
    quiet_libraries()
    plain_warnings("braidlora")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the pool is closed
        try:
            state = start(*given)
        except Exception as error:
            connection.send((None, error, traceback.format_exc()))
            return
        connection.send((None, None, ""))
        while True:
            function, job = connection.recv()
            try:
                connection.send((function(state, job), None, ""))
            except Exception as error:
                connection.send((None, error, traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process, whatever it is doing, when the one that started it was killed.

    An orphan would train on, hold the memory that a resumed run needs, and write into the same folders.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
