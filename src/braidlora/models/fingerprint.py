"""The fingerprint of a base model: which weights these are, whatever dtype they are loaded in."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from braidlora.config import ModelSection
from braidlora.models.location import local_folder
from braidlora.models.stored_weights import stored_fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOADED = "loaded-sha256:"


def base_fingerprint(section: ModelSection, model: PreTrainedModel | None = None) -> str | None:
    """The fingerprint of the base that `section` names.

    It covers the stored weights where there are safetensors files on this machine. Otherwise (a hub model that was
    converted while loading) it covers the weights in memory, and then depends on their dtype; the prefix `loaded-`
    tells the two apart.

    Args:
        section: the recipe's `model`.
        model: the base as loaded from it, without an adapter; None if it has not been loaded.

    Returns:
        `sha256:…` or `loaded-sha256:…` and 64 hex digits; None if nothing is stored here and no model is given.

    Raises:
        ConfigError: a stored file is damaged.
    """
    folder = local_folder(section)
    stored = None if folder is None else stored_fingerprint(folder)
    if stored is not None or model is None:
        return stored
    return _loaded_fingerprint(model)


def _loaded_fingerprint(model: PreTrainedModel) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.base_model.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # bitsandbytes keeps strings among its tensors
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor_bytes(tensor.detach().reshape(-1)))
    return LOADED + digest.hexdigest()


def tensor_bytes(values: torch.Tensor) -> bytes:
    """The bytes of a tensor, in the order of its elements."""
    import torch

    return values.contiguous().cpu().view(torch.uint8).numpy().tobytes()
