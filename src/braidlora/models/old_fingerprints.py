"""Fingerprints of braidlora 0.1, kept to compare a base with records of that version. They are never written.

Both sample the weights, so they miss a change between the samples.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from braidlora.models.fingerprint import tensor_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OLD = re.compile(r"[0-9a-f]{16}")
_SAMPLES = 64  # values of each tensor
_BLOCKS, _BLOCK = 64, 4096  # blocks of each weight file, and bytes in a block


def is_old(fingerprint: str) -> bool:
    """Whether a fingerprint was written by braidlora 0.1: sixteen hex digits without a prefix."""
    return _OLD.fullmatch(fingerprint) is not None


def sampled_fingerprint(model: PreTrainedModel) -> str:
    """What 0.1 recorded in checkpoints and federations: name, shape, dtype and 64 values of each tensor of the body."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.base_model.state_dict().items():
        if not isinstance(parameter, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        digest.update(tensor_bytes(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]))
    return digest.hexdigest()[:16]


def sampled_files(folder: Path | None) -> str | None:
    """What 0.1 recorded in comparisons: size and 64 blocks of each weight file; None without a folder."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for block in range(_BLOCKS):
                file.seek(size * block // _BLOCKS)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
