"""`compare --engine ray`: cells as tasks of Ray, on this machine or on a cluster whose machines share a folder.

A cell is the same function as in a worker process, so the table is the same. Ray decides by resources how many run at
once; a task whose worker or machine is lost runs again and resumes from the cell's last checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import socket
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from braidlora.comparison._cells import Cell
from braidlora.config import RunConfig
from braidlora.errors import BraidloraError, ConfigError
from braidlora.processes import WorkerLost
from braidlora.runs import working_for
from braidlora.training.stop import StopRequest, stop_requests

_RETRIES = 3  # of a cell whose worker or machine was lost
_POLL = 0.2  # seconds between two looks at a stop request
_SAVING = 600.0  # seconds that stopped cells have to save
# What a task on another machine needs of this one's environment.
_PASSED = ("BRAIDLORA_DATA", "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")


@dataclass(frozen=True)
class RaySettings:
    """Where cells run and what one takes.

    Args:
        address: of a running cluster, as `ray.init` takes it (`auto`, HOST:PORT); None starts Ray on this machine and
            ends it afterwards.
        cpus: per cell; None: the recipe's `training.threads`.
        gpus: per cell, may be a fraction; None: one where the machine that starts the comparison has a GPU, else none.

    Raises:
        ConfigError: a number that is negative, or not finite.
    """

    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.cpus is not None and not 0 < self.cpus < float("inf"):
            raise ConfigError(f"--cell-cpus: got {self.cpus:g}; expected a number above 0.")
        if self.gpus is not None and not 0 <= self.gpus < float("inf"):
            raise ConfigError(f"--cell-gpus: got {self.gpus:g}; expected a number of at least 0.")

    def resources(self, recipe: RunConfig) -> dict[str, float]:
        """What a cell takes: `{"num_cpus", "num_gpus"}`."""
        gpus = float(torch.cuda.is_available()) if self.gpus is None else self.gpus
        return {"num_cpus": self.cpus or float(recipe.training.threads or 1), "num_gpus": gpus}


class RayCells:
    """A connection to Ray that runs cells.

    Args:
        settings: where.
        recipe: of the comparison; `directory` holds it as `marker`, by which a machine knows the common folder.
        directory: of the comparison.
        marker: a file in it.

    Raises:
        ConfigError: Ray is not installed or does not answer, or no machine has room for a cell.
    """

    def __init__(self, settings: RaySettings, recipe: RunConfig, directory: Path, marker: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--engine ray: Ray is not installed; pip install 'braidlora[ray]'.")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A cell that takes no GPU sees none, which a future Ray no longer does by itself.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        import ray

        self._ray, self._resources = ray, settings.resources(recipe)
        self._marker = (str(directory.absolute() / marker), _digest(directory / marker))
        passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
        try:
            ray.init(
                address=settings.address, log_to_driver=False, logging_level=logging.ERROR,
                include_dashboard=None if settings.address else False, runtime_env={"env_vars": passed},
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--address {settings.address}: Ray does not answer ({error}). `ray start --head` on one machine "
                "starts a cluster and prints its address."
            ) from error
        self.at_once = self._room()
        if not self.at_once:
            self.close()
            wanted = ", ".join(f"{value:g} {name[4:]}" for name, value in self._resources.items() if value)
            raise ConfigError(
                f"--engine ray: no machine of the cluster has {wanted} for a cell; lower --cell-cpus and --cell-gpus."
            )

    def _room(self) -> int:
        """How many cells fit at once, machine by machine."""
        total = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                has = {
                    "num_cpus": node["Resources"].get("CPU", 0),
                    "num_gpus": node["Resources"].get("GPU", 0),
                }
                total += int(
                    min((has[name] // need for name, need in self._resources.items() if need), default=1)
                )
        return total

    def as_completed(self, cells: Sequence[Cell]) -> Generator[tuple[Cell, str | None], None, None]:
        """Every cell with why its training failed, or None, as soon as it is done.

        Raises:
            Interrupted: by SIGTERM or Ctrl-C; the cells that run have saved.
            WorkerLost: the same cell lost its worker again and again.
            BraidloraError: what would fail other cells as well.
        """
        task = self._ray.remote(max_retries=_RETRIES, **self._resources)(_run_at_ray)
        employer = {"pid": os.getpid(), "host": socket.gethostname()}
        with stop_requests() as stop:
            stop.deferred = True  # Ray must not be left in the middle of a call
            waiting = {task.remote(cell, str(Path.cwd()), self._marker, employer): cell for cell in cells}
            try:
                while waiting:
                    done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=_POLL)
                    for reference in done:
                        yield waiting.pop(reference), self._reply(reference)
                    if stop.signal_number:
                        raise stop.interrupted("stopped")
            finally:
                self._stop(list(waiting), stop)

    def _reply(self, reference: Any) -> str | None:
        try:
            reply: str | None = self._ray.get(reference)
            return reply
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BraidloraError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            raise WorkerLost(
                f"Ray lost the worker of a run {_RETRIES + 1} times: {str(error).splitlines()[0]} The usual "
                "cause is running out of memory: reserve more per run with --cell-cpus. Finished runs are kept."
            ) from error

    def _stop(self, references: list[Any], stop: StopRequest) -> None:
        """Ask the cells that run to save, and wait for them; a second Ctrl-C does not wait."""
        stop.deferred = False
        for reference in references:
            self._ray.cancel(reference, force=False)
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=_SAVING)

    def close(self) -> None:
        """Leave the cluster; a Ray that was started here ends."""
        self._ray.shutdown()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run_at_ray(cell: Cell, folder: str, marker: tuple[str, str], employer: dict[str, Any]) -> str | None:
    """One cell, in a worker of Ray's on any machine."""
    from braidlora.comparison._runner import run_cell

    path, digest = marker
    try:
        shared = _digest(Path(path)) == digest
        os.chdir(folder)
    except OSError:
        shared = False
    if not shared:
        raise ConfigError(
            f"--engine ray: {socket.gethostname()} cannot find {path} of the machine that started the comparison; "
            "the output, the data and the base must be in a folder shared by all machines, at the same path."
        )
    with working_for(employer):
        return run_cell(cell)
