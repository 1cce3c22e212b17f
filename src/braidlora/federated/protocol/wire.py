"""Tensors as they travel and rest: safetensors, which carries data and no code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from braidlora.errors import CheckpointError, FederationError
from braidlora.json_text import loads

_HEADER = "braidlora"  # one key, since safetensors writes several in an order of its own


def pack(tensors: Mapping[str, Tensor], header: str = "") -> bytes:
    """The bytes that travel; none for no tensors. The same tensors give the same bytes."""
    if not tensors and not header:
        return b""
    ordered = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    data: bytes = save(ordered, {_HEADER: header} if header else None)
    return data


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors of what `pack` gave.

    Raises:
        FederationError: it is no safetensors.
    """
    if not data:
        return {}
    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError) as error:
        raise FederationError(f"{len(data)} bytes were received that are no safetensors: {error}.") from None


def read_file(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Tensors and header of a file of packed tensors: of the very bytes that were checked.

    Args:
        sha256: what the file was when it was written; None takes it as it is.

    Raises:
        CheckpointError: it is missing or damaged, or has changed since it was written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    if sha256 is not None and (got := hashlib.sha256(data).hexdigest()) != sha256:
        raise CheckpointError(
            f"{path}: sha256 {got[:12]}… does not match the manifest's {sha256[:12]}…: the file changed since it was "
            "written."
        )
    return parse(path, data)


def parse(path: Path, data: bytes) -> tuple[dict[str, Tensor], str]:
    """Tensors and header of `data`, which was read from `path`.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        tensors = dict(load(data))
        length = int.from_bytes(data[:8], "little")  # of the JSON that a safetensors file begins with
        return tensors, loads(data[8 : 8 + length]).get("__metadata__", {}).get(_HEADER, "")
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors: {error}.") from None
