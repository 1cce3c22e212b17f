"""Cells side by side: killed and carried on, the comparison ends with the numbers of a serial one nobody touched."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparison_files import comparison_of, without_timings

WORDS = ["--methods=lora,alora", "--seeds=0,1", "--no-single-task"]


pytestmark = pytest.mark.timeout(900)  # interpreters start slowly where cores are few


@pytest.fixture
def start(recipe):
    """`braidlora compare` with two workers in a process of its own, which does not outlive the test."""
    started = []

    def call(output, *words):
        command = [
            sys.executable,
            "-m",
            "braidlora",
            "compare",
            str(recipe),
            f"--output={output}",
            "--workers=2",
        ]
        started.append(subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def workers_of(process):
    """Processes that this one has started, its workers among them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def running(pid):
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_killed_workers_and_all_and_carried_on_it_ends_with_the_numbers_of_a_serial_one(
    start, compare, finished, tmp_path
):
    killed = tmp_path / "killed"
    process = start(killed, *WORDS)
    # In the midst of a run of the second seed, with a checkpoint on disk; the first seed's were made side by side.
    wait_for(lambda: list(killed.glob("cells/*-seed1/checkpoints/step-6")))
    wait_for(lambda: len(list(killed.glob("cells/*-seed0/cell.json"))) == 2)
    workers = workers_of(process)
    process.kill()
    process.wait()
    assert workers
    wait_for(lambda: not any(map(running, workers)), seconds=60)
    done = {path.parent.name for path in killed.glob("cells/*/cell.json")}
    assert {"lora-seed0", "alora-seed0"} <= done
    assert not (killed / "comparison.json").exists()
    assert compare(killed, *WORDS).code == 0
    whole = shutil.copytree(finished, tmp_path / "whole")
    assert compare(whole, *WORDS).code == 0  # the same rows of it
    assert without_timings(comparison_of(killed)) == without_timings(comparison_of(whole))
    weights = "adapter/adapter_model.safetensors"
    for cell in (killed / "cells").iterdir():
        assert (cell / weights).read_bytes() == (
            tmp_path / "whole" / "cells" / cell.name / weights
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_the_runs_in_hand_save_and_the_command_says_how_to_go_on(start, tmp_path, number):
    process = start(tmp_path / "out", *WORDS, "--training.max_steps=2000", "--training.save_steps=2000")
    wait_for(lambda: len([log for log in tmp_path.glob("out/cells/*/log.jsonl") if log.stat().st_size]) == 2)
    workers = workers_of(process)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert "0 of 5 runs are done; the same command resumes" in said
    assert "Traceback" not in said
    wait_for(lambda: not any(map(running, workers)), seconds=60)
    for cell in (tmp_path / "out" / "cells").iterdir():
        [checkpoint] = (cell / "checkpoints").glob("step-*")  # saved where it stood
        assert 0 < int(checkpoint.name.split("-")[1]) < 2000


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_with_a_remedy(start, tmp_path):
    process = start(tmp_path / "out", *WORDS, "--training.max_steps=2000")
    wait_for(lambda: list(tmp_path.glob("out/cells/*/log.jsonl")))
    for worker in workers_of(process):
        if b"spawn_main" in Path(f"/proc/{worker}/cmdline").read_bytes():
            os.kill(worker, signal.SIGKILL)
            break
    _, said = process.communicate(timeout=600)
    assert process.returncode == 4
    assert "running out of memory" in said
    assert "--workers 1" in said
