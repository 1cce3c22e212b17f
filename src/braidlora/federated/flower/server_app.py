"""Flower's ServerApp for sites: runs the federation of a job file, and writes how it ended next to it."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.config import FederatedConfig, load_config
from braidlora.errors import BraidloraError, FederationError, Interrupted
from braidlora.federated.flower.grid_runner import GridRunner
from braidlora.federated.flower.hello import form_of_base
from braidlora.federated.flower.names import AskedNames, KeyNames, Names
from braidlora.federated.flower.post import Patience, Post
from braidlora.federated.flower.roster import make_roster
from braidlora.federated.flower.settings import ServerSettings, read_server
from braidlora.federated.flower.start import STATUS, clients_with_keys, result_of
from braidlora.federated.flower.status import StatusFile
from braidlora.federated.protocol.server import needed_updates
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.workers import JobRunner
from braidlora.federated.site.clients import Clients
from braidlora.runs import FederatedDirectory, atomic_write_json, read_json
from braidlora.training.stop import StopRequest

if TYPE_CHECKING:
    from flwr.serverapp import Grid


def run_job(grid: Grid, path: Path) -> None:
    """Run the federation that a job file describes.

    `PATH.result.json` then has `{"exit_code", "error"}`, and `"stopped": true` if somebody stopped it; the process that
    started the job waits for it.

    Raises:
        BraidloraError: what the federation raised, after it has been written down.
    """
    job = read_json(path)
    try:
        _run(grid, {**job, "name": path.name})
    except BaseException as error:
        _finish(path, _outcome(error))
        raise
    _finish(path, {"exit_code": 0, "error": ""})


def _outcome(error: BaseException) -> dict[str, Any]:
    if isinstance(error, Interrupted | KeyboardInterrupt):  # Flower does so when the SuperLink ends
        text = (
            "the server app was stopped: the SuperLink ended, or someone ran `flwr stop`. Committed rounds are intact; "
            "--resume auto continues."
        )
        return {"exit_code": FederationError.exit_code, "error": text, "stopped": True}
    if isinstance(error, BraidloraError):
        return {"exit_code": error.exit_code, "error": str(error)}
    return {"exit_code": 1, "error": "".join(traceback.format_exception(error))}


def _finish(path: Path, result: dict[str, Any]) -> None:
    atomic_write_json(result_of(path), result)


def _run(grid: Grid, job: Mapping[str, Any]) -> None:
    folder = Path(job["folder"])
    settings = read_server(folder)
    config = load_config(folder / "recipe.yaml", [], FederatedConfig, content=job["recipe"].encode())

    def connect(
        config: FederatedConfig, directory: FederatedDirectory, stop: StopRequest
    ) -> tuple[Clients, JobRunner]:
        return connect_sites(grid, config, directory, stop, settings, folder / STATUS, job)

    local_run = Path(job["local_run"]) if job["local_run"] else None
    federate(
        config,
        resume=job["resume"],
        overwrite=job["overwrite"],
        rollback=job["rollback"],
        local_run=local_run,
        progress=False,
        connect=connect,
    )


def connect_sites(
    grid: Grid,
    config: FederatedConfig,
    directory: FederatedDirectory,
    stop: StopRequest,
    settings: ServerSettings,
    status_path: Path,
    job: Mapping[str, Any],
) -> tuple[Clients, GridRunner]:
    """The clients and the runner of a deployment, after the handshake.

    Raises:
        ConfigError: the recipe's clients are not the sites of server.yaml.
        FederationError: too few sites connected, or they differ.
    """
    clients = clients_with_keys(config, settings)
    status = StatusFile(status_path, directory.path, job["name"], clients)
    poll = 1.0
    names: Names
    if settings.node_auth:
        names = KeyNames({site: key for site, key in settings.sites.items() if site in clients}, status)
    else:
        names = AskedNames(grid, clients, status, poll)
    patience = Patience(settings.deadline, settings.absence, settings.wait, poll)
    runner = GridRunner(
        Post(grid, stop, patience, names, status),
        config,
        clients,
        remote=True,
        accept_fresh=job["accept_fresh"],
        directory=directory,
    )
    runner.connect(needed_updates(config, len(clients)))
    saved: dict[str, Any] = {}
    if job["resume"] and directory.partition.is_file():  # of sites that are not connected now
        saved = directory.read_json(directory.partition.name)
    welcomes = runner.welcomes
    rows = {name: one["tasks"] for name, one in saved.items()}
    rows |= {name: welcome.rows for name, welcome in welcomes.items()}
    bases = {name: one["base"] for name, one in saved.items() if "base" in one}
    bases |= {name: form_of_base(name, welcome) for name, welcome in welcomes.items()}
    first = next(iter(welcomes.values()))
    return make_roster(clients, rows, first.labels, first.common, bases), runner
