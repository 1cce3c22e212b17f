"""A round's updates on disk until the round closes, so that memory does not grow with the number of clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from braidlora.federated.protocol.update import ClientUpdate
from braidlora.runs import remove_tree

_ALIGNED = 8  # bytes; every tensor starts at an offset that suits all its types


class _Place(NamedTuple):
    """Position of a tensor in a file."""

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Spool(MutableMapping[str, ClientUpdate]):
    """Updates by client: the first `memory` bytes in memory, the rest in files of the folder given to `use`.

    The files contain raw numbers and are memory-mapped; they belong to this process and this round.
    """

    def __init__(self, memory: int = 2**28) -> None:
        self._memory, self._taken = memory, 0
        self._folder: Path | None = None
        self._held: dict[str, tuple[ClientUpdate, dict[str, _Place]]] = {}

    @contextmanager
    def use(self, folder: Path) -> Iterator[None]:
        """Use this folder, which is created and removed again with everything in it."""
        folder.mkdir()
        self._folder = folder
        try:
            yield
        finally:
            self._folder, self._held, self._taken = None, {}, 0
            remove_tree(folder)

    def __setitem__(self, client: str, update: ClientUpdate) -> None:
        if client in self._held:
            del self[client]
        size = _bytes(update)
        if self._taken + size <= self._memory:
            self._held[client], self._taken = (update, {}), self._taken + size
            return
        places: dict[str, _Place] = {}
        if update.tensors:
            with self._path(client).open("wb") as file:
                for name, tensor in update.tensors.items():
                    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                    places[name] = _Place(file.tell(), plain.numel(), tensor.dtype, tuple(tensor.shape))
                    file.write(plain.numpy().data)
                    file.write(bytes(-file.tell() % _ALIGNED))
        self._held[client] = dataclasses.replace(update, tensors={}), places

    def __getitem__(self, client: str) -> ClientUpdate:
        terms, places = self._held[client]
        if not places:
            return terms
        path = self._path(client)
        mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        tensors: dict[str, Tensor] = {
            name: mapped[place.start : place.start + place.size].view(place.dtype).view(place.shape)
            for name, place in places.items()
        }
        return dataclasses.replace(terms, tensors=tensors)

    def __delitem__(self, client: str) -> None:
        update, places = self._held.pop(client)
        self._taken -= _bytes(update)  # tensors in files are not counted
        if places:
            self._path(client).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def _path(self, client: str) -> Path:
        assert self._folder is not None, "used outside `use`"
        return self._folder / client


def _bytes(update: ClientUpdate) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in update.tensors.values())
