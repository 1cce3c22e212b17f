"""`federate` under torchrun or `accelerate launch`: the first process runs the federation, the others train with it."""

from __future__ import annotations

import os
import warnings
from typing import Any

from braidlora.config import FederatedConfig
from braidlora.errors import ConfigError
from braidlora.federated.site.clients import load_clients
from braidlora.federated.site.follow import follow
from braidlora.federated.site.group import Group
from braidlora.processes import launched
from braidlora.training.threads import cpu_threads

_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def check_launch(config: FederatedConfig, connect: Any = None) -> None:
    """Reject what does not go together with several processes.

    Raises:
        ConfigError: it names the other way.
    """
    _, size = launched()
    if size == 1:
        return
    if connect is not None:
        raise ConfigError(
            f"{size} processes were launched, but with Flower the server trains nothing. Start this command without "
            "torchrun and accelerate launch, and set `processes` in the site.yaml of a site with several GPUs."
        )
    if config.federation.workers > 1:
        raise ConfigError(
            f"federation.workers: {config.federation.workers} clients at a time, but {size} processes were launched to "
            "train one client together. Set federation.workers=1, or start the command without torchrun and accelerate "
            "launch."
        )
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "").lower() == "true":
            raise ConfigError(
                f"accelerate is configured for {name}, which splits the base model among processes; `federate` gives "
                "each process a whole one. Launch it with: accelerate launch --multi_gpu. If the base does not fit on "
                "one GPU, set model.quantization=4bit."
            )


def follow_federation(config: FederatedConfig) -> None:
    """Take part in the trainings of the first process until its federation ends. Writes nothing.

    Raises:
        ConfigError, DataError, TrainingError: the recipe, its data or the base model cannot be used.
    """
    with warnings.catch_warnings(), cpu_threads(config.training.threads):
        warnings.simplefilter("ignore")  # the first process warns
        clients = load_clients(config)
        group = Group()
        group.ignore_signals()
        follow(group, config, clients)
