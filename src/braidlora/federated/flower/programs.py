"""Flower's programs as children of ours: they end when we end, and at a site they run no code that the server sent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

# What Flower starts, by name, for a task that the server may ask for.
CLIENT = "flwr-clientapp"
OTHERS = ("flwr-serverapp", "flwr-agentapp", "flwr-model", "flwr-connector", "flwr-simulation")
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
    """End a program and what it has started: politely, then by force."""
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        if process.poll() is None:
            process.send_signal(number)
            end = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # the rest of its session


def write_programs(folder: Path) -> None:
    """Write the programs that Flower finds at a site in place of its own: our client app, and refusals of all else."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    python = shlex.quote(sys.executable)
    for name, text in (
        (CLIENT, f'#!/bin/sh\nexec {python} -m braidlora.federated.flower.pinned "$@"\n'),
        *((one, f"#!/bin/sh\necho '{one}: refused at this site' >&2\nexit 1\n") for one in OTHERS),
    ):
        path = folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o700)


def end_with_parent() -> None:
    """In the child, before it becomes the program: the kernel sends it SIGTERM when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
