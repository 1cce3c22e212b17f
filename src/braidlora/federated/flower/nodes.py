"""Prints the SuperNodes that a SuperLink knows, as JSON; `flwr supernode list` does not print their public keys.

Run as `python -m braidlora.federated.flower.nodes CONNECTION`, with Flower's environment for its command line.
"""

from __future__ import annotations

import contextlib
import json
import sys

from braidlora.terminal import say


def main(connection: str) -> None:
    """Ask the SuperLink's Control API."""
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.proto.control_pb2 import ListNodesRequest

    with contextlib.redirect_stdout(sys.stderr):  # Flower says which SuperLink it uses
        client = init_http_client_from_connection(read_superlink_connection(connection))
        try:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
        finally:
            client.close()
    found = [{"status": one.status, "public_key": one.public_key.decode(errors="replace")} for one in nodes]
    say(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
