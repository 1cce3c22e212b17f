"""`federate_on_ray` on a machine that Ray takes to have one GPU; every job is recorded with its process and times."""

import os
import sys
import time
from pathlib import Path

import ray

from braidlora.config import FederatedConfig, load_config
from braidlora.federated.flower import simulated
from braidlora.federated.flower.jobs import JOB

init = ray.init


def with_one_gpu(**options):
    return init(num_cpus=4, num_gpus=1, **options)


class Recorded(simulated.Actors):
    """Writes `PID GPU BEGIN END` for every job."""

    def __call__(self, context):
        name, answer = super().__call__(context)

        def record(client, envelope):
            begin = time.time()
            found = answer(client, envelope)
            if envelope.kind == JOB:
                line = f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')} {begin} {time.time()}\n"
                (Path(self._config.output).parent / f"job-{name}-{begin}").write_text(line)
            return found

        return name, record


if __name__ == "__main__":
    ray.init, simulated.Actors = with_one_gpu, Recorded
    config = load_config(sys.argv[1], [], FederatedConfig)
    simulated.federate_on_ray(config, cpus=1, gpus=float(sys.argv[2]), progress=False)
