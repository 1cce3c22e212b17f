"""The worker pool: replies in order, errors from the worker, lost workers, and an end that saves or kills."""

import os
import signal
import time
from pathlib import Path

import pytest

from braidlora.errors import DataError
from braidlora.processes import Pool, WorkerLost


def make_state(base):
    return {"base": base, "jobs": 0}


def add(state, job):
    """Sleeps longer for small jobs, so that replies come out of order."""
    state["jobs"] += 1
    time.sleep(max(0, 3 - job) * 0.2)
    return state["base"] + job


def count(state, _):
    state["jobs"] += 1
    return os.getpid(), state["jobs"]


def fail(state, job):
    raise job


def die(state, job):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(state, folder):
    if not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def save_on_sigterm(state, folder):
    """Like a training run: notes the signal, and writes what it has before it ends."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    (folder / "started").touch()
    while not stopped:
        time.sleep(0.01)
    (folder / "saved").touch()


def never_ends(state, folder):
    (folder / "started").touch()
    time.sleep(1000)


def refuse_to_start(base):
    raise DataError(f"no base {base!r}")


def test_replies_come_in_the_order_of_the_jobs_or_of_completion():
    with Pool(2, make_state, (10,), remedy="") as pool:
        assert list(pool.in_order(add, range(8))) == [(job, 10 + job) for job in range(8)]
        completed = list(pool.as_completed(add, range(4)))
        assert sorted(completed) == [(job, 10 + job) for job in range(4)]
        assert completed[0][0] != 0


def test_jobs_are_read_only_as_far_ahead_as_there_are_workers():
    read = []
    with Pool(1, make_state, (0,), remedy="") as pool:
        replies = pool.in_order(count, (read.append(job) for job in range(100)))
        next(replies)
    assert len(read) == 3


def test_an_error_in_a_worker_is_raised_here_and_the_worker_goes_on():
    with Pool(1, make_state, (0,), remedy="") as pool:
        with pytest.raises(DataError, match="a row") as ours:
            pool.run(fail, DataError("a row"))
        assert ours.value.__cause__ is None
        with pytest.raises(KeyError, match="gone") as bug:
            pool.run(fail, KeyError("gone"))
        assert "raise job" in str(bug.value.__cause__)
        assert pool.run(add, 5) == 5


def test_a_lost_worker_is_reported_and_replaced():
    with Pool(1, make_state, (0,), remedy="Close a program.") as pool:
        first, _ = pool.run(count, None)
        with pytest.raises(
            WorkerLost, match=r"ended with exit code -9.*running out of memory. Close a program."
        ):
            pool.run(die, None)
        second, jobs = pool.run(count, None)
        assert (second != first, jobs) == (True, 1)


def test_the_job_of_a_lost_worker_is_retried_if_the_pool_retries(tmp_path):
    with Pool(1, make_state, (0,), retries=1, remedy="") as pool:
        assert pool.run(die_once, tmp_path) == "done"
        with pytest.raises(WorkerLost):
            pool.run(die, None)


def test_what_cannot_start_says_why():
    with pytest.raises(DataError, match="no base 3"):
        Pool(2, refuse_to_start, (3,), remedy="")


@pytest.mark.parametrize("saves", [True, False])
def test_closing_lets_a_job_save_or_kills_it(tmp_path, saves):
    job = save_on_sigterm if saves else never_ends
    with Pool(1, make_state, (0,), saves=saves, remedy="") as pool:
        pool._threads.submit(pool.run, job, tmp_path)
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        [worker] = pool._workers
    assert (tmp_path / "saved").exists() == saves
    assert worker.process.exitcode == (0 if saves else -signal.SIGKILL)
    assert not Path(f"/proc/{worker.process.pid}").exists()
