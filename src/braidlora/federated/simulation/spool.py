"""A round's updates on disk until the round closes, so that memory does not grow with the number of clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from braidlora.federated.protocol.update import ClientUpdate
from braidlora.federated.protocol.wire import pack
from braidlora.runs import remove_tree


class Spool(MutableMapping[str, ClientUpdate]):
    """Updates by client: the first `memory` bytes in memory, the rest in files of the folder given to `use`.

    The files are memory-mapped; they belong to this process and this round.
    """

    def __init__(self, memory: int = 2**28) -> None:
        self._memory, self._taken = memory, 0
        self._folder: Path | None = None
        self._held: dict[str, tuple[ClientUpdate, list[str]]] = {}  # with the names of tensors in a file

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
            self._held[client], self._taken = (update, []), self._taken + size
            return
        self._path(client).write_bytes(pack(update.tensors))
        self._held[client] = dataclasses.replace(update, tensors={}), list(update.tensors)

    def __getitem__(self, client: str) -> ClientUpdate:
        update, names = self._held[client]
        if not names:
            return update
        tensors = load_file(self._path(client))
        # In the update's own order, on which sums over tensors depend.
        return dataclasses.replace(update, tensors={name: tensors[name] for name in names})

    def __delitem__(self, client: str) -> None:
        update, names = self._held.pop(client)
        self._taken -= _bytes(update)  # tensors in files are not counted
        if names:
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
