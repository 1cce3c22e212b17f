"""`--engine flower-sim`: all clients on this machine, on Flower's simulation engine and Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from braidlora.config import FederatedConfig
from braidlora.errors import ConfigError, FederationError
from braidlora.federated.flower.answerer import Answerer
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.environment import check_installed, prepare
from braidlora.federated.flower.grid_runner import GridRunner
from braidlora.federated.flower.names import AskedNames
from braidlora.federated.flower.post import Patience, Post
from braidlora.federated.flower.ray_room import check_resources, start_ray
from braidlora.federated.flower.status import Status
from braidlora.federated.simulation.driver import FederationResult, federate
from braidlora.federated.simulation.workers import JobRunner
from braidlora.federated.site.clients import Clients, load_clients
from braidlora.runs import FederatedDirectory
from braidlora.training.stop import StopRequest, stop_requests

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

_answerers: dict[str, Answerer] = {}  # of this process: an actor of Ray's, which keeps its base model


class PolledStop(StopRequest):
    """A request that another thread looks at: the signal only leaves its number here."""

    @property
    def deferred(self) -> bool:
        """Always: the thread that waits here is not the one that works."""
        return True

    @deferred.setter
    def deferred(self, value: bool) -> None:
        pass


class Actors:
    """Finds the answerer of an actor.

    Args:
        config: the recipe.
        clients: all clients, with their rows.
        threads: CPU threads per actor, on which the order of additions depends.
    """

    def __init__(self, config: FederatedConfig, clients: Clients, threads: int) -> None:
        self._config, self._clients, self._threads = config, clients, threads

    def __call__(self, context: Context) -> tuple[str, Callable[[str, Envelope], Envelope]]:
        """The client of a node, and what answers for it."""
        name = sorted(self._clients.by_name)[int(str(context.node_config["partition-id"]))]
        key = self._config.output
        if key not in _answerers:
            torch.set_num_threads(self._threads)
            root = Path(self._config.output)
            _answerers[key] = Answerer(
                self._config,
                self._clients,
                lambda client, experiment: FederatedDirectory(root).client(client),
            )
        return name, _answerers[key].answer


def connect_simulated(grid: Grid, config: FederatedConfig, clients: Clients, stop: StopRequest) -> GridRunner:
    """The runner of a simulation's clients."""
    status = Status()
    names = AskedNames(grid, clients.by_name, status, poll=0.05)
    post = Post(grid, stop, Patience(deadline=7 * 86400, sites=120, poll=0.05), names, status)
    runner = GridRunner(post, config, clients.by_name, remote=False)
    runner.connect(needed=len(clients.by_name))
    return runner


def federate_on_ray(
    config: FederatedConfig,
    *,
    cpus: float | None = None,
    gpus: float = 0.0,
    **options: Any,
) -> FederationResult:
    """`federate` with the clients' jobs on Ray: as many at once as the machine has room for.

    Args:
        config: the recipe.
        cpus, gpus: what one client's job takes; gpus may be a fraction. Default: the recipe's `training.threads`, or
            two CPUs.
        options: as of `federate`.

    Raises:
        ConfigError: Flower or Ray is not installed, or the machine has no room for a client.
        BraidloraError: as `federate`.
    """
    check_installed(simulation=True)
    if config.federation.workers != 1:
        raise ConfigError(
            "federation.workers applies to the local engine; flower-sim runs as many clients in parallel as fit: "
            "--client-cpus and --client-gpus set what each client uses."
        )
    check_resources(cpus, gpus)
    prepare()
    config = config.model_copy(update={"output": str(Path(config.output).absolute())})
    clients = load_clients(config)
    threads = config.training.threads or torch.get_num_threads()
    resources = {
        "num_cpus": float(config.training.threads or 2) if cpus is None else cpus,
        "num_gpus": gpus,
    }
    request, outcome = PolledStop(), dict[str, Any]()
    thread = threading.Thread(
        target=_simulate,
        args=(config, clients, threads, resources, request, outcome, options),
        name="flower-sim",
    )
    with stop_requests() as stop:
        stop.deferred = True
        thread.start()
        # Ray takes over the signals of the main thread, so its work is done in another one.
        while thread.is_alive():
            thread.join(0.2)
            for number in (signal.SIGTERM, signal.SIGINT):  # Ray's own library takes them over when it starts
                signal.signal(number, stop.receive)
            request.signal_number = stop.signal_number
    if "error" in outcome:
        raise outcome["error"]
    result: FederationResult = outcome["result"]
    return result


def _simulate(
    config: FederatedConfig,
    clients: Clients,
    threads: int,
    resources: dict[str, float],
    stop: StopRequest,
    outcome: dict[str, Any],
    options: dict[str, Any],
) -> None:
    import logging

    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from braidlora.federated.flower.client_app import make_client_app

    logging.getLogger("flwr").setLevel(
        logging.ERROR
    )  # it announces that run_simulation will go, and every message
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def connect(
            config: FederatedConfig, directory: FederatedDirectory, stop: StopRequest
        ) -> tuple[Clients, JobRunner]:
            return clients, connect_simulated(grid, config, clients, stop)

        try:
            outcome["result"] = federate(config, connect=connect, stop=stop, **options)
        except BaseException as error:  # handed to the thread that waits
            outcome["error"] = error

    try:
        start_ray(resources)
        run_simulation(
            server_app=server,
            client_app=make_client_app(Actors(config, clients, threads)),
            num_supernodes=len(clients.by_name),
            backend_config={"client_resources": resources},
        )
    except ConfigError as error:
        outcome.setdefault("error", error)
    except BaseException as error:
        if "result" not in outcome:
            outcome.setdefault(
                "error", FederationError(f"Flower's simulation failed ({type(error).__name__}: {error}).")
            )
    if not outcome:
        outcome["error"] = FederationError("Flower's simulation ended without a result.")
