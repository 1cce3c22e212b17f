"""A round's updates on disk until it is known which of them count, so that memory does not grow with the clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from braidlora.federated._update import ClientUpdate
from braidlora.federated.wire import pack, read_file
from braidlora.runs import remove_tree


class Spool(MutableMapping[str, ClientUpdate]):
    """Updates by client. Tensors are in files, one per client, within `inside`; what is in memory is a few numbers."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._terms: dict[str, ClientUpdate] = {}

    @contextmanager
    def inside(self, folder: Path) -> Iterator[None]:
        """Use this folder, which is made here and removed at the end with all that is in it."""
        folder.mkdir()
        self._folder = folder
        try:
            yield
        finally:
            self._folder, self._terms = None, {}
            remove_tree(folder)

    def __setitem__(self, client: str, update: ClientUpdate) -> None:
        if update.tensors:
            self._path(client).write_bytes(pack(update.tensors))
        self._terms[client] = dataclasses.replace(update, tensors=dict.fromkeys(update.tensors))  # type: ignore[arg-type]

    def __getitem__(self, client: str) -> ClientUpdate:
        terms = self._terms[client]
        return (
            dataclasses.replace(terms, tensors=read_file(self._path(client))[0]) if terms.tensors else terms
        )

    def __delitem__(self, client: str) -> None:
        if self._terms.pop(client).tensors:
            self._path(client).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)

    def _path(self, client: str) -> Path:
        assert self._folder is not None, "used outside `inside`"
        return self._folder / f"{client}.safetensors"
