"""What the first process of a group has the others do: load a client's tensors and take part in its training."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from braidlora.federated.protocol.wire import pack, parse
from braidlora.json_text import loads

_TENSOR, _OPTIMIZER = "tensor:", "optimizer:"


@dataclass(frozen=True)
class Loaded:
    """The arguments of the last `Host.load`."""

    rank: int
    scaling: float
    tensors: Mapping[str, Tensor]
    trains: Collection[str] | None
    frozen: Collection[str]


@dataclass(frozen=True)
class Order:
    """A client's training in a round.

    Args:
        client: its name.
        round, seed, optimizer: as of `train_locally`.
        loaded: what is loaded before.
    """

    client: str
    round: int
    seed: int
    loaded: Loaded
    optimizer: Mapping[str, Tensor]

    def pack(self) -> bytes:
        """As a safetensors file, whose header has all but the tensors."""
        loaded = self.loaded
        header = {
            "client": self.client,
            "round": self.round,
            "seed": self.seed,
            "rank": loaded.rank,
            "scaling": loaded.scaling,
            "trains": None if loaded.trains is None else sorted(loaded.trains),
            "frozen": sorted(loaded.frozen),
        }
        tensors = {_TENSOR + name: tensor for name, tensor in loaded.tensors.items()}
        moments = {_OPTIMIZER + name: tensor for name, tensor in self.optimizer.items()}
        return pack({**tensors, **moments}, json.dumps(header))

    @classmethod
    def unpack(cls, data: bytes) -> Order:
        """The order of these bytes."""
        tensors, text = parse(data, "an order")
        header = loads(text)
        own, moments = (
            {name.removeprefix(kind): one for name, one in tensors.items() if name.startswith(kind)}
            for kind in (_TENSOR, _OPTIMIZER)
        )
        loaded = Loaded(header["rank"], header["scaling"], own, header["trains"], header["frozen"])
        return cls(header["client"], header["round"], header["seed"], loaded, moments)
