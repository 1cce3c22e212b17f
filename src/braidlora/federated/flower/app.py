"""What the Flower App in `federated/flower/flower_app` consists of."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.config import FederatedConfig, load_config
from braidlora.errors import ConfigError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.environment import prepare

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

_found: dict[str, Any] = {}  # of this process: what answers, by recipe


def client_app() -> ClientApp:
    """The ClientApp: in a simulation for all clients, at a SuperNode for the site of `--node-config 'site="DIR"'`."""
    prepare()
    from braidlora.federated.flower.client_app import make_client_app

    return make_client_app(_locate)


def server_app() -> ServerApp:
    """The ServerApp: runs the job that `braidlora federate --engine flower` wrote, or a simulation's recipe."""
    prepare()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        job = str(context.run_config.get("job") or "")
        if job:
            from braidlora.federated.flower.server_app import run_job

            run_job(grid, Path(job))
            return
        from braidlora.federated.flower.simulated import connect_simulated
        from braidlora.federated.simulation.driver import federate
        from braidlora.federated.site.clients import load_clients

        config = _config(context.run_config)
        federate(
            config,
            resume="auto" if context.run_config.get("resume") else None,
            progress=False,
            connect=lambda config, directory, stop: (
                clients := load_clients(config),
                connect_simulated(grid, config, clients, stop),
            ),
        )

    return app


def _locate(context: Context) -> tuple[str, Callable[[str, Envelope], Envelope]]:
    site = context.node_config.get("site")
    if site is not None:
        from braidlora.federated.flower.settings import read_site
        from braidlora.federated.flower.site_answerer import site_answerer
        from braidlora.federated.flower.site_recipe import site_config

        folder = Path(str(site))
        settings = read_site(folder)
        if str(folder) not in _found:
            _found[str(folder)] = site_answerer(folder, settings.name, site_config(folder, settings))
        return settings.name, _found[str(folder)].answer
    if "partition-id" not in context.node_config:
        raise ConfigError(
            "this node is not a site: start it with `braidlora site join`, or give --node-config 'site=\"DIR\"'."
        )
    import torch

    from braidlora.federated.flower.simulated import Actors
    from braidlora.federated.site.clients import load_clients

    config = _config(context.run_config)
    key = config.model_dump_json()
    if key not in _found:
        _found[key] = Actors(config, load_clients(config), config.training.threads or torch.get_num_threads())
    actors: Actors = _found[key]
    return actors(context)


def _config(run_config: Mapping[str, Any]) -> FederatedConfig:
    """The recipe of a run's configuration. A relative output would be in a folder that Flower chooses."""
    config = load_config(
        str(run_config["recipe"]), shlex.split(str(run_config["overrides"])), FederatedConfig
    )
    output = str(run_config.get("output") or "")
    if not Path(output).is_absolute():
        raise ConfigError(
            f"output: expected an absolute path for the run directory, got {output!r}. Give "
            "--run-config 'output=\"/path\"'."
        )
    return config.model_copy(update={"output": output})
