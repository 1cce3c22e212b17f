"""Which base a model is: a record of it, and what differs from the record of a run, an adapter or a federation."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from braidlora.config import ModelSection
from braidlora.models.base import local_folder
from braidlora.models.stored_weights import stored_fingerprint
from braidlora.runs import BaseRecord

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAMPLES = 64
_OLD = re.compile(r"[0-9a-f]{16}")  # fingerprints of braidlora 0.1
_LOADED = "loaded-sha256:"
# Settings of a configuration that leave alone what the base computes from token ids: where it came from, what its
# head is called, what the tokenizer decides, and what is recorded beside it.
_NOT_COMPARED = re.compile(
    r"_.*|name_or_path|transformers.*|torch_dtype|dtype|architectures|auto_map|use_cache|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|gradient_checkpointing|task_specific_params|.*_token_id|return_dict|output_.*|torchscript|pruned_heads"
    r"|chunk_size_feed_forward|initializer.*|quantization_config|use_bfloat16|attn_implementation|tokenizer_class|prefix"
)


def base_record(model: PreTrainedModel, section: ModelSection) -> BaseRecord:
    """What to remember of a base that `load_base(section)` gave.

    Its fingerprint is that of the stored checkpoint; where no safetensors can be found (a hub model that was converted
    while it was loaded), of the weights as they were loaded, which then depends on their dtype.
    """
    folder = local_folder(section)
    fingerprint = None if folder is None else stored_fingerprint(folder)
    return BaseRecord(
        path="".join(letter if letter.isprintable() else "?" for letter in section.path),
        revision=section.revision or None,
        fingerprint=fingerprint or loaded_fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=section.quantization,
        architecture=architecture(model.config.to_dict()),
    )


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that change what the base computes; unset ones are left out."""
    return {
        str(key): _plain(value)
        for key, value in sorted(config.items(), key=lambda item: str(item[0]))
        if value is not None and not _NOT_COMPARED.fullmatch(str(key))
    }


def _plain(value: Any) -> Any:
    """As JSON has it; infinity (a bound of Mamba's time steps) becomes text."""
    if isinstance(value, Mapping):
        return architecture(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(one) for one in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, bool | int | str) or value is None:
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def loaded_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over every tensor of the body as it stands in memory."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.base_model.state_dict().items():
        if isinstance(tensor, torch.Tensor):  # bitsandbytes keeps strings beside its tensors
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor.detach().reshape(-1)))
    return _LOADED + digest.hexdigest()


def sampled_fingerprint(model: PreTrainedModel) -> str:
    """The sixteen digits that braidlora 0.1 recorded: name, shape, dtype and 64 values of each tensor of the body.

    It does not tell bases apart that differ elsewhere, and serves to recognize old records alone.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.base_model.state_dict().items():
        if not isinstance(parameter, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        digest.update(_bytes(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]))
    return digest.hexdigest()[:16]


def _bytes(values: torch.Tensor) -> bytes:
    import torch

    return values.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def is_old(fingerprint: str) -> bool:
    """Whether a fingerprint is one of braidlora 0.1, which `sampled_fingerprint` is compared with."""
    return _OLD.fullmatch(fingerprint) is not None


def base_differences(
    saved: Mapping[str, Any] | str, current: BaseRecord, sampled: str, *, same_form: bool = True
) -> tuple[list[str], list[str]]:
    """How a base differs from the recorded one: (what makes it another base, what is only worth a warning).

    Args:
        saved: the record, or the bare fingerprint of an old one.
        current: of the base at hand.
        sampled: its `sampled_fingerprint`, for old records.
        same_form: whether dtype and quantization are known to be those of the record. An old fingerprint says nothing
            where they are not.
    """
    record: Mapping[str, Any] = {"fingerprint": saved} if isinstance(saved, str) else saved
    then, path = record["fingerprint"], record.get("path", "the base")
    if is_old(then):
        if not same_form:
            return [], [
                f"the record of the base is one of braidlora 0.1 ({then}), which cannot be compared in another dtype "
                "or quantization"
            ]
        now = sampled
    elif then.startswith(_LOADED) != current.fingerprint.startswith(_LOADED):
        return [], [
            f"the base was recorded as {then[:20]}…, and is {current.fingerprint[:20]}…: not comparable"
        ]
    else:
        now = current.fingerprint
    problems = []
    if then != now:
        problems.append(f"base model: {path} ({_short(then)}) then, {current.path} ({_short(now)}) now")
    problems += [
        f"base model: {key} is {old!r} then, {new!r} now"
        for key, old, new in _changed(record.get("architecture", {}), current.architecture)
    ]
    warnings = [
        f"the base's {key} was {record[key]}, is {getattr(current, key)}"
        for key in ("dtype", "quantization")
        if record.get(key) is not None and record[key] != getattr(current, key)
    ]
    return problems, warnings


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Settings that both sides have, with other values. What one side alone has is a default of another version."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() & new.keys()):
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            found += _changed(old[key], new[key], f"{prefix}{key}.")
        elif old[key] != new[key]:
            found.append((prefix + key, old[key], new[key]))
    return found


def _short(fingerprint: str) -> str:
    kind, colon, digits = fingerprint.rpartition(":")
    return f"{kind}{colon}{digits[:16]}" + ("…" if len(digits) > 16 else "")
