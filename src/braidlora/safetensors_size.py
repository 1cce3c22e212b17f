"""The size of a safetensors file, from shapes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# safetensors stores wider types first, so that all are aligned.
_TYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ORDER = tuple(_TYPES)


def serialized_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Size in bytes of `safetensors.torch.save` of tensors of these shapes; 0 without tensors.

    Args:
        shapes: by tensor name.
        dtype: of all tensors, or by name.
        metadata: further text in the header; adapters on disk have {"format": "pt"}.
    """
    if not shapes:
        return 0
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    names = {name: str(dtypes[name]).removeprefix("torch.") for name in shapes}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in sorted(shapes, key=lambda name: (_ORDER.index(names[name]), name)):
        end = offset + math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {
            "dtype": _TYPES[names[name]],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    # Eight bytes of length, and a header padded so that the data begin at a multiple of eight.
    return 8 + math.ceil(text / 8) * 8 + offset
