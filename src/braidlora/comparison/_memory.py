"""Peak memory of a run, and how much memory is free."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
_RESET_PEAK = "5"  # proc(5), clear_refs: VmHWM starts again from what is resident now
_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Peak:
    """Peak memory in MiB, None if it cannot be measured, and what it was measured on."""

    mib: float | None
    what: str


class PeakMemory:
    """Measures from its construction to `read`: torch's allocator on CUDA, otherwise the process's resident memory."""

    def __init__(self) -> None:
        self._reset = False
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # not Linux, or a container that does not allow it
            (_PROC / "clear_refs").write_text(_RESET_PEAK)
            self._reset = True

    def read(self) -> Peak:
        import torch

        if torch.cuda.is_available():
            return Peak(torch.cuda.max_memory_allocated() / MIB, "torch's CUDA allocator")
        if self._reset:
            [line] = [line for line in (_PROC / "status").read_text().split("\n") if line.startswith("VmHWM")]
            return Peak(int(line.split()[1]) / 1024, "the process's resident memory (VmHWM)")
        if sys.platform == "win32":
            return Peak(None, "not measured on this system")
        import resource

        unit = MIB if sys.platform == "darwin" else 1024
        since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return Peak(since_start, "the process's resident memory since its start (ru_maxrss)")


def free_mib() -> float | None:
    """Memory that new processes may use: of the machine, or of the control group if that is less. None: unknown."""
    try:
        free = _fields(Path("/proc/meminfo"))["MemAvailable:"] / 1024
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")  # version 2; file caches there are freed on demand
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit ("max")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free = min(free, (limit - used + _fields(group / "memory.stat")["inactive_file"]) / MIB)
    return free


def _fields(path: Path) -> dict[str, int]:
    """Lines of `NAME NUMBER …` as the kernel writes them."""
    return {words[0]: int(words[1]) for line in path.read_text().split("\n") if (words := line.split())}
