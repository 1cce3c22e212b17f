"""Which folders a server may load adapters from, if it is limited at all.

`braidlora serve` sets the variable; every process of vLLM inherits it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

VARIABLE = "BRAIDLORA_ADAPTER_FOLDERS"


def check(path: str) -> None:
    """Raise unless an adapter is in one of the folders that the variable names, links followed.

    Raises:
        ValueError: it is elsewhere.
    """
    allowed = os.environ.get(VARIABLE)
    if allowed is None:
        return
    here = Path(os.path.realpath(os.path.expanduser(path)))
    if not any(here.is_relative_to(folder) for folder in allowed.split(os.pathsep) if folder):
        raise ValueError(f"{path}: not in a folder that this server loads adapters from.")


def install() -> None:
    """Check every adapter before vLLM resolves its path, which may download it."""
    from vllm.lora import worker_manager

    from braidlora.serving.vllm.seams import replaced

    original = worker_manager.get_adapter_absolute_path

    def get_adapter_absolute_path(lora_path: str) -> Any:
        check(lora_path)
        return original(lora_path)

    worker_manager.get_adapter_absolute_path = replaced(original, get_adapter_absolute_path)
