"""What either side keeps between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from braidlora.federated.protocol.outliers import Typical


@dataclass(frozen=True)
class ServerState:
    """All that a server keeps between rounds.

    Args:
        experiment: id of the federation, which its payloads and its clients' states carry.
        shared: the shared state; empty before a round has counted.
        shared_round: the round it comes from; 0 before any.
        counted: by client, the last round in which its update counted.
        typical: the median size of the clients' changes in that round, and of the work behind them.
        weights: by client, the share of its update in the shared state's last round; they sum to 1.
        velocity: v of FedAvgM, by the names of the shared state; empty without it.
    """

    experiment: str = ""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    shared_round: int = 0
    counted: Mapping[str, int] = field(default_factory=dict)
    typical: Typical | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    velocity: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientState:
    """What a client keeps between rounds. It never leaves the client.

    Args:
        client: its name.
        experiment: id of the federation.
        round: the round it was trained in; 0 before the first.
        tensors: adapter and head, by PEFT's names; under flora also the stack, as `carried_A`, `carried_B`; under
            fedalt the others' mean and the mixer.
        optimizer: the optimizer's state where it is kept, by `KEY/TENSOR`.
    """

    client: str
    experiment: str
    round: int
    tensors: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


class StateStore(Protocol):
    """Where a client keeps its states: `committed` ones, and a `pending` one until its round's outcome is known.

    A client holds the state of every step as pending before it sends the update. Whether that update counts, it learns
    from its next payload.
    """

    @property
    def client(self) -> str:
        """Name of the client."""

    @property
    def committed(self) -> int:
        """Round of the newest committed state; 0 if there is none."""

    @property
    def pending(self) -> int:
        """Round of the pending state; 0 if there is none."""

    def load(self, round: int, experiment: str) -> ClientState:
        """The state of a round, verified; raises CheckpointError if it is damaged or of another federation."""

    def hold(self, state: ClientState) -> None:
        """Keep a new state as pending, durably."""

    def commit(self) -> None:
        """The pending state counted."""

    def drop(self) -> None:
        """The pending state did not count."""
