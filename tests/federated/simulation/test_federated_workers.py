"""Worker processes that end early, and that outlive nobody."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from client_states import payload_of

from braidlora.errors import TrainingError
from braidlora.federated.protocol.wire import pack_message
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.runner import Job
from braidlora.federated.simulation.workers import Workers
from braidlora.federated.site.clients import load_clients
from braidlora.runs import verify
from helpers.results import federation_bytes


def test_a_process_that_died_between_jobs_is_told_as_such(make_config):
    """The pipe breaks when the next job is sent, which has nothing to do with a disk."""
    config = make_config(retries=0)
    workers = Workers(config, load_clients(config))
    try:
        [worker] = workers._pool._workers
        worker.process.kill()
        worker.process.join()
        with pytest.raises(TrainingError, match="a worker process ended with exit code -9"):
            workers.run(Job("up", Path("up"), pack_message(payload_of(1)), score=True))
    finally:
        workers.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_outlives_a_killed_federation(make_config, in_child, tmp_path):
    """Else it would go on training, in the memory and in the folder that the resumed one needs."""
    config = make_config(workers=2, rounds=1, local={"steps": 10**6})
    started = []

    def kill_in_training(child):
        rounds = tmp_path / "run" / "rounds"
        while child.is_alive() and not list(rounds.glob(".round-1.*.partial")):
            time.sleep(0.1)
        time.sleep(2.0)
        started.extend(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split())
        child.kill()

    assert in_child(config, while_running=kill_in_training).code == -9
    assert len(started) >= 2
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def test_a_worker_killed_while_it_writes_a_state_leaves_no_trace(make_config, in_child, tmp_path):
    """Its job is done by another worker: the bytes of one process, and nothing left over."""
    settings = {"rule": "flora", "ranks": [2, 4, 3], "rounds": 3}
    federate(make_config("whole", **settings), progress=False)
    killed = []

    def kill_a_writer(child):
        while child.is_alive() and not killed:
            for folder in (tmp_path / "run").glob("clients/*/state/.pending-2.*.partial"):
                killed.append(int(folder.name.split(".")[2].partition("-")[0]))  # the writer's process id
                os.kill(killed[-1], signal.SIGKILL)
                break

    outcome = in_child(make_config(workers=2, **settings), while_running=kill_a_writer)
    assert outcome.code == 0, outcome.output
    assert killed
    ours, theirs = federation_bytes(tmp_path / "run"), federation_bytes(tmp_path / "whole")
    assert {name: ours[name] for name in ours if "experiment" not in name} == {
        name: theirs[name] for name in theirs if "experiment" not in name
    }
    assert verify(tmp_path / "run")["unfinished"] == []
