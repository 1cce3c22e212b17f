"""What one of several launched processes does in tests: `federate` for each recipe file, one after another."""

import sys

from braidlora.config import FederatedConfig, load_config
from braidlora.federated.simulation.driver import federate

if __name__ == "__main__":
    for path in sys.argv[1:]:
        federate(load_config(path, [], FederatedConfig), progress=False)
