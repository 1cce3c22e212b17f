"""Flower's programs as children of ours: they end when we end, and at a site they run no code that the server sent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

# What Flower starts by name: its dispatcher, and what does a task that the server may ask for.
DISPATCHER, CLIENT, SERVER = "flower-superexec", "flwr-clientapp", "flwr-serverapp"
_OWN = {  # as Flower's own scripts do, with this interpreter, wherever it is installed
    DISPATCHER: "from flwr.supercore.cli import flower_superexec as run",
    SERVER: "from flwr.superlink.cli import flwr_serverapp as run",
}
REJECTED = ("flwr-agentapp", "flwr-model", "flwr-connector", "flwr-simulation")
_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str], env: dict[str, str], log: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that ends when this process ends, even by SIGKILL (on Linux).

    Args:
        log: where its output goes; default: where ours goes.
    """
    # Its own session, so that the terminal's Ctrl-C reaches us alone, and we end it in order.
    return subprocess.Popen(
        list(command),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT if log is not None else None,
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a program and all that it has started: politely, then by force."""
    started = _descendants(process.pid)  # of which some have sessions of their own
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        if process.poll() is None:
            process.send_signal(number)
            end = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # the rest of its session
    end = time.monotonic() + patience  # they end by themselves when they see that it is gone
    while any(_is_same(*one) for one in started) and time.monotonic() < end:
        time.sleep(0.1)
    for pid, since in started:
        if _is_same(pid, since):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[tuple[int, int]]:
    """The processes that a process has started, and those that they have started: number and time of start (Linux)."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.parent.name))
    found, left = [], [pid]
    while left:
        children = parents.get(left.pop(), [])
        left += children
        found += [(child, since) for child in children if (since := _started_at(child)) is not None]
    return found


def _started_at(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; None if it is gone."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _is_same(pid: int, since: int) -> bool:
    return _started_at(pid) == since


def write_programs(folder: Path, *, site: bool) -> None:
    """Write the programs that Flower finds in place of its own.

    Args:
        folder: created if it is missing.
        site: whether they are a site's, which runs our client app and rejects all else, whatever the server asks for.
            A server runs the server app.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    python = shlex.quote(sys.executable)
    lines = {name: f'exec {python} -c {shlex.quote(f"{code}; run()")} "$@"' for name, code in _OWN.items()}
    for name in (*REJECTED, *((SERVER,) if site else (CLIENT,))):
        lines[name] = f"echo '{name}: rejected here' >&2; exit 1"
    if site:
        lines[CLIENT] = f'exec {python} -m braidlora.federated.flower.pinned "$@"'
    for name, line in lines.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        path.chmod(0o700)


def end_with(parent: int) -> None:
    """From now on, end this process once it is no longer a child of `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """In the child, before it becomes the program: the kernel sends it SIGTERM when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
