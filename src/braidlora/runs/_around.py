"""The run or federation that a folder belongs to."""

from __future__ import annotations

from pathlib import Path

from braidlora.runs._directory import RunDirectory
from braidlora.runs._federated import FederatedDirectory


def run_around(folder: Path) -> RunDirectory | None:
    """The run that `folder` is, or that it belongs to as an adapter or a checkpoint."""
    if not folder.is_dir():
        return None
    real = folder.resolve()
    for candidate in (real, real.parent, real.parent.parent):
        run = RunDirectory(candidate)
        inside = real in (candidate, run.adapter, run.adapter_init) or real.parent == run.checkpoints
        if inside and run.config.is_file() and run.environment.is_file():
            return RunDirectory.at(candidate)
    return None


def federation_around(path: Path) -> FederatedDirectory | None:
    """The federation that `path` is, or that it belongs to as clients/NAME or clients/NAME/adapter."""
    if not path.is_dir():
        return None
    real = path.resolve()
    for candidate in (real, *real.parents[1:3]):
        federation = FederatedDirectory(candidate)
        if federation.state() not in ("new", "foreign"):
            return federation
    return None
