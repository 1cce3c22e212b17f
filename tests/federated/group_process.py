"""What one of several launched processes does in tests: `federate` for each recipe file, one after another."""

import os
import sys
from pathlib import Path

from braidlora.config import FederatedConfig, load_config
from braidlora.federated.simulation.driver import federate
from braidlora.federated.site.local_training import ClientTrainer

FAULT = "out-of-memory"  # name of a recipe in which the second process runs out of memory once, in its second step


def fail_once(monkey=ClientTrainer):
    whole, steps = monkey.compute_loss, []

    def compute_loss(self, *args, **options):
        steps.append(1)
        if len(steps) == 2:
            monkey.compute_loss = whole
            raise MemoryError("a longer row than the other process has")
        return whole(self, *args, **options)

    monkey.compute_loss = compute_loss


if __name__ == "__main__":
    for path in sys.argv[1:]:
        if Path(path).stem == FAULT and os.environ["RANK"] == "1":
            fail_once()
        federate(load_config(path, [], FederatedConfig), progress=False)
