"""What the starting command finds out about the server app."""

import os
import subprocess
import sys

from braidlora.federated.flower.start import pid_is_alive


def test_a_process_that_runs_is_alive():
    assert pid_is_alive(os.getpid())


def test_a_killed_process_is_not_alive_before_its_parent_looks_at_it():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert pid_is_alive(child.pid)
    os.kill(child.pid, 9)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # wait for its end, and leave it a zombie
    assert not pid_is_alive(child.pid)
    child.communicate()
    assert not pid_is_alive(child.pid)
