"""What a client keeps from round to round, and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from braidlora.errors import CheckpointError
from braidlora.federated.protocol.wire import pack, read_file
from braidlora.json_text import loads

_OPTIMIZER = "optimizer:"


@dataclass(frozen=True)
class SavedState:
    """A client's state on disk.

    Args:
        path: its file.
        sha256: of the file as it was written; what is read later must have it.
    """

    path: Path
    sha256: str


@dataclass(frozen=True)
class ClientState:
    """What a client keeps from round to round.

    Args:
        client: whose it is.
        experiment: of which federation.
        round: the last round in which its update counted; 0 before the first.
        tensors: its adapter and head, by PEFT's names; under flora also the stack, as `carried_A`, `carried_B`.
        optimizer: the optimizer's state where it is kept, by `KEY/TENSOR`.
    """

    client: str
    experiment: str
    round: int
    tensors: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> SavedState:
        """Write the state; whoever commits the folder around it makes that last."""
        header = json.dumps({"client": self.client, "experiment": self.experiment, "round": self.round})
        moments = {f"{_OPTIMIZER}{name}": tensor for name, tensor in self.optimizer.items()}
        data = pack({**self.tensors, **moments}, header)
        path.write_bytes(data)
        return SavedState(path, hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, saved: SavedState, client: str, experiment: str) -> ClientState:
        """Read the state of `client` in `experiment`.

        Raises:
            CheckpointError: it is damaged, or another client's, or of another experiment.
        """
        path = saved.path
        tensors, text = read_file(path, saved.sha256)
        try:
            header = loads(text)
            found = (header["client"], header["experiment"])
            round = int(header["round"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: not the state of a client: its header is {text!r}.") from None
        for what, got, expected in zip(("client", "experiment"), found, (client, experiment), strict=True):
            if got != expected:
                raise CheckpointError(
                    f"{path}: the state of {what} {got!r}; expected {what} {expected!r}. A client's state goes with "
                    "the federation it was made in: same recipe, data and base."
                )
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OPTIMIZER)}
        moments = {
            name.removeprefix(_OPTIMIZER): tensor
            for name, tensor in tensors.items()
            if name.startswith(_OPTIMIZER)
        }
        return cls(client, experiment, round, own, moments)
