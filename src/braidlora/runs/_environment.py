"""The environment of a run: versions, machine, threads, date."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("braidlora", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Versions, machine, thread count and date as plain JSON values.

    Thread count and devices come from torch and are null if torch has not been imported.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    torch = sys.modules.get("torch")
    devices = None
    if torch is not None:
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    return {
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "devices": devices,
        },
        "threads": torch.get_num_threads() if torch is not None else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def warn_of_another_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn if versions or the number of threads differ from those of the first start."""
    old = {**before["versions"], "threads": before["threads"]}
    new = {**now["versions"], "threads": now["threads"]}
    changed = [
        f"{key} was {old.get(key, 'nothing')}, is {new.get(key, 'nothing')}"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key, "nothing") != new.get(key, "nothing")
    ]
    if changed:
        warnings.warn(f"resume may not be bit-exact: {'; '.join(changed)}", stacklevel=3)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor()  # not Linux
    return platform.processor() or platform.machine()
