"""What a client of a simulation takes of the machine, and whether Ray has room for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from braidlora.errors import ConfigError


def check_resources(cpus: float | None, gpus: float) -> None:
    """Reject what Ray could not schedule.

    Raises:
        ConfigError: names the option.
    """
    if cpus is not None and cpus <= 0:
        raise ConfigError(f"--client-cpus {cpus:g}: expected a number above 0.")
    if not 0 <= gpus <= 1:
        raise ConfigError(
            f"--client-gpus {gpus:g}: expected 0 to 1, as a client trains on one GPU or on a share of one. To train "
            "each client on several GPUs, use the local engine under torchrun or accelerate launch."
        )


def start_ray(resources: Mapping[str, float]) -> None:
    """Start Ray as Flower would, which then finds it started, and see whether a client fits.

    Args:
        resources: `num_cpus` and `num_gpus` of one client.

    Raises:
        ConfigError: it does not; names what there is.
    """
    import ray

    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    ray.init(include_dashboard=False, logging_level="error", runtime_env={"env_vars": {"PYTHONPATH": path}})
    there = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in ray.nodes()]
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    if any(cpus <= has_cpus and gpus <= has_gpus for has_cpus, has_gpus in there):
        return
    ray.shutdown()
    has = "; ".join(f"{has_cpus:g} CPUs and {has_gpus:g} GPUs" for has_cpus, has_gpus in there)
    raise ConfigError(
        f"a client takes {cpus:g} CPUs and {gpus:g} GPUs (--client-cpus, --client-gpus), and this machine has {has}; "
        "lower them."
    )
