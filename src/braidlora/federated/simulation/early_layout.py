"""Run directories of braidlora 0.1, whose rounds hold the clients' states: `rounds/round-N/clients/NAME.safetensors`.

They are read as they are; a resume copies the states into the clients' stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from braidlora import runs
from braidlora.errors import CheckpointError
from braidlora.federated.site.store import ClientStore
from braidlora.runs import FederatedDirectory


def early_states(files: Mapping[str, Any]) -> dict[str, str]:
    """By client, the state files that a round's manifest lists; none in today's rounds."""
    return {PurePosixPath(name).stem: name for name in files if name.startswith("clients/")}


def copy_states(directory: FederatedDirectory) -> None:
    """Copy the states of all intact rounds of the early layout into the clients' stores."""
    for number in directory.checkpoint_steps():
        try:
            committed = runs.Committed(directory.checkpoint(number))
            counted = committed.read_json("server.json")["counted"]
            for client, name in early_states(committed.files or {}).items():
                ClientStore(directory.client(client), client).adopt(counted[client], committed.read(name))
        except CheckpointError:  # an older round than the one that is resumed, which was verified
            continue
