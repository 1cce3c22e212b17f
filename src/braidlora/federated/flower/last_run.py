"""Whether a server's run is active, and how its last one ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from braidlora.federated.flower.start import JOBS, STATUS, pid_is_alive, result_of
from braidlora.json_text import loads

State = Literal["none", "starting", "running", "finished", "stopped", "failed"]
_RESULT = result_of(Path("job.json")).name.removeprefix("job")


@dataclass(frozen=True)
class LastRun:
    """The run that was started last.

    Args:
        state: `stopped` if somebody stopped it, or its server app was killed.
        output: its run directory; None if nothing was ever started.
        has_status: whether the status file is this run's.
        error: why it failed.
    """

    state: State
    output: Path | None = None
    has_status: bool = False
    error: str = ""

    @property
    def active(self) -> bool:
        """Whether it goes on."""
        return self.state in ("starting", "running")

    def text(self, rounds: int) -> str:
        """How it ended, for people.

        Args:
            rounds: how many it has committed.
        """
        done = f"{rounds} round{'' if rounds == 1 else 's'}"
        where = f"after round {rounds}" if rounds else "before its first round was complete"
        again = "; --resume auto continues it" if rounds else ""
        if self.state == "finished":
            return f"no run active; the last run finished: {done}"
        if self.state == "stopped":
            return f"no run active; the last run was stopped {where}{again}"
        if self.state == "failed":
            why = next(iter(self.error.strip().splitlines()), "")
            return f"no run active; the last run failed: {why}"
        return "no run has been started" if self.state == "none" else self.state


def last_run(folder: Path, status: Mapping[str, Any]) -> LastRun:
    """The last run of a server's folder.

    Args:
        status: the content of its status file; empty if there is none.
    """
    paths = [path for path in (folder / JOBS).glob("*.json") if not path.name.endswith(_RESULT)]
    if not paths:
        return LastRun("none")
    path = max(paths, key=lambda one: (one.stat().st_mtime_ns, one.name))
    has_status = status.get("job") == path.name
    job = _read(path)
    output = job.get("output") or (status["output"] if has_status else None)
    made = Path(output) if output else None
    if result_of(path).is_file():
        result = _read(result_of(path))
        if result.get("exit_code") == 0:
            return LastRun("finished", made, has_status)
        state: State = "stopped" if result.get("stopped") else "failed"
        return LastRun(state, made, has_status, str(result.get("error", "")))
    if has_status:
        running = _still_runs(status["pid"], folder / STATUS)
        return LastRun("running" if running else "stopped", made, has_status)
    return LastRun("starting" if _still_runs(job.get("started_by", 0), path) else "stopped", made, has_status)


def _still_runs(pid: int, written: Path) -> bool:
    """Whether the process that wrote a file runs; one with its number that started later is another one."""
    import psutil

    try:
        return pid_is_alive(pid) and psutil.Process(pid).create_time() <= written.stat().st_mtime + 1.0
    except (psutil.Error, OSError, ValueError):
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        found = loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
