"""One writer at a time: a second process is refused, and a crash releases the lock."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from braidlora.errors import CheckpointError, TrainingError
from braidlora.runs import LOCK, RunDirectory, hold, holder_of, remove_leftovers
from braidlora.runs import _flock as flock

HOLDER = """
import sys, time
from pathlib import Path
from braidlora.runs import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held_by_another(tmp_path):
    """A process that holds the lock of `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_with_pid_and_host(tmp_path, held_by_another):
    with pytest.raises(CheckpointError) as caught, hold(tmp_path / "run"):
        pass
    assert caught.value.exit_code == 5
    assert f"process {held_by_another.pid} on {socket.gethostname()}" in str(caught.value)
    assert "choose another folder with --output=PATH" in str(caught.value)
    assert holder_of(tmp_path / "run")["pid"] == held_by_another.pid
    assert RunDirectory.at(tmp_path / "run").state() == "new"  # a lock is nobody's file


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_crash_releases_the_lock(tmp_path, held_by_another, number):
    held_by_another.send_signal(number)
    held_by_another.wait()
    assert (tmp_path / "run" / LOCK).exists()
    assert holder_of(tmp_path / "run") is None
    with hold(tmp_path / "run"):
        assert holder_of(tmp_path / "run")["pid"] == os.getpid()
        (tmp_path / "run" / "result").touch()
    assert os.listdir(tmp_path / "run") == ["result"]


def test_a_lock_covers_what_is_below(tmp_path, held_by_another):
    with (
        pytest.raises(CheckpointError, match=f"process {held_by_another.pid}"),
        hold(tmp_path / "run" / "cells" / "a"),
    ):
        pass
    assert os.listdir(tmp_path / "run") == [LOCK]
    with hold(tmp_path / "other"):  # beside it is free
        pass


def test_what_is_put_beside_a_folder_stands_below_what_holds_it(tmp_path, held_by_another):
    """An export into somebody's run: its lock stands in the run, whose own lock covers it."""
    with (
        pytest.raises(CheckpointError, match=f"process {held_by_another.pid} "),
        hold(tmp_path / "run" / "out", adjacent=True),
    ):
        pass
    with hold(tmp_path / "out", adjacent=True):
        pass
    held_by_another.kill()
    held_by_another.wait()
    with hold(tmp_path / "run"), hold(tmp_path / "run" / "out", adjacent=True):
        pass


def test_a_holder_may_enter_again_and_below(tmp_path):
    with hold(tmp_path / "run"):
        with hold(tmp_path / "run"), hold(tmp_path / "run" / "cells" / "a"):
            assert (tmp_path / "run" / "cells" / "a" / LOCK).is_file()
        assert holder_of(tmp_path / "run") is not None
    assert os.listdir(tmp_path) == []  # nothing was written, so nothing is left


def test_another_thread_is_another_writer(tmp_path):
    errors = []

    def enter():
        try:
            with hold(tmp_path / "run"):
                pass
        except CheckpointError as error:
            errors.append(str(error))

    with hold(tmp_path / "run"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert f"process {os.getpid()}" in errors[0]


def test_a_fork_neither_keeps_nor_releases_the_lock(tmp_path):
    with hold(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            os._exit(0 if holder_of(tmp_path / "run") is not None else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert holder_of(tmp_path / "run")["pid"] == os.getpid()
        sleeper = os.fork()
        if sleeper == 0:
            time.sleep(30)
            os._exit(0)
    try:
        assert holder_of(tmp_path / "run") is None
        with hold(tmp_path / "run"):
            pass
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)


def test_many_processes_one_at_a_time(tmp_path):
    """Lock files come and go; two holders would see each other's mark."""
    script = """
import os, sys, time
from pathlib import Path
from braidlora.errors import CheckpointError
from braidlora.runs import hold
folder, got = Path(sys.argv[1]), 0
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        with hold(folder / "run"):
            mark = os.open(folder / "mark", os.O_CREAT | os.O_EXCL)
            got += 1
            os.unlink(folder / "mark")
            os.close(mark)
    except CheckpointError:
        pass
print(got)
"""
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outcomes = [process.communicate() for process in crowd]
    assert all(process.returncode == 0 for process in crowd), outcomes
    assert sum(int(out) for out, _ in outcomes) > 3
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(TrainingError, match=r"file.*cannot be written: .*--directory=PATH")
    with refused, hold(tmp_path / "file" / "run", instead="--directory=PATH"):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def unsupported(descriptor, *, shared):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(flock, "_lock", unsupported)
    with pytest.warns(UserWarning, match="this file system has no locks"), hold(tmp_path / "run"):
        pass


def test_only_the_first_process_of_torchrun_holds_it(tmp_path, monkeypatch, held_by_another):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with hold(tmp_path / "run"):
        pass


def test_the_holders_name_is_json(tmp_path):
    with hold(tmp_path / "run"):
        assert set(json.loads((tmp_path / "run" / LOCK).read_text())) == {"pid", "host", "command", "since"}


def test_a_cleanup_leaves_what_is_being_written(tmp_path):
    """Staging folders and files of live processes stay, those of dead ones go."""
    script = """
import sys, time
from pathlib import Path
from braidlora.runs import commit_directory
with commit_directory(Path(sys.argv[1]) / "step-3") as staging:
    (staging / "weights").touch()
    print(staging.name, flush=True)
    time.sleep(60)
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    names = [process.stdout.readline().strip() for process in writers]
    assert len(set(names)) == 2
    writers[0].kill()
    writers[0].wait()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [names[1]]
    writers[1].kill()
    writers[1].wait()
