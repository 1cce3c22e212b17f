"""Records of base models: what a run, an adapter or a federation remembers of its base, and how a base differs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from braidlora.config import ModelSection
from braidlora.models.fingerprint import LOADED, base_fingerprint
from braidlora.models.gguf import SUFFIX
from braidlora.models.hub_copies import recorded
from braidlora.models.old_fingerprints import is_old
from braidlora.runs import BaseRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that do not change what the base computes from token ids: its origin, the names of its labels, what the
# tokenizer decides, and bookkeeping.
_NOT_COMPARED = re.compile(
    r"_.*|name_or_path|transformers.*|torch_dtype|dtype|architectures|auto_map|use_cache|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|gradient_checkpointing|task_specific_params|.*_token_id|return_dict|output_.*|torchscript|pruned_heads"
    r"|chunk_size_feed_forward|initializer.*|quantization_config|use_bfloat16|attn_implementation|tokenizer_class|prefix"
)


def base_record(model: PreTrainedModel, section: ModelSection) -> BaseRecord:
    """The record of a base that `load_base(section)` returned."""
    fingerprint = base_fingerprint(section, model)
    assert fingerprint is not None  # a loaded model always has one
    return BaseRecord(
        path="".join(letter if letter.isprintable() else "?" for letter in base_name(recorded(section))),
        revision=section.revision or None,
        fingerprint=fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=section.quantization,
        architecture=architecture(model.config.to_dict()),
    )


def base_name(section: ModelSection) -> str:
    """The base as one path, which is a `model.path` again: of a GGUF file in a folder, the file's."""
    inside = section.gguf_file is not None and not section.path.endswith(SUFFIX)
    return f"{section.path.rstrip('/')}/{section.gguf_file}" if inside else section.path


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that change what the base computes; unset ones are left out."""
    return {
        str(key): _plain(value)
        for key, value in sorted(config.items(), key=lambda item: str(item[0]))
        if value is not None and not _NOT_COMPARED.fullmatch(str(key))
    }


def _plain(value: Any) -> Any:
    """The value as JSON stores it; infinity (a bound of Mamba's time steps) becomes text."""
    if isinstance(value, Mapping):
        return architecture(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(one) for one in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, bool | int | str) or value is None:
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def base_differences(
    saved: Mapping[str, Any] | str, current: BaseRecord, sampled: str, *, same_form: bool = True
) -> tuple[list[str], list[str]]:
    """How a base differs from the recorded one: (differences that make it another base, differences to warn of).

    Args:
        saved: the record, or the bare fingerprint of an old one.
        current: the record of the base at hand.
        sampled: its `sampled_fingerprint`, which records of 0.1 are compared with.
        same_form: whether dtype and quantization are known to match the record's; an old fingerprint cannot be
            compared otherwise.
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
    elif then.startswith(LOADED) != current.fingerprint.startswith(LOADED):
        return [], [
            f"the base was recorded as {then[:20]}…, and is {current.fingerprint[:20]}…: not comparable"
        ]
    else:
        now = current.fingerprint
    problems = []
    if then != now:
        problems.append(f"base model: {path} ({_short(then)}) then, {current.path} ({_short(now)}) now")
    problems += [
        f"base model: {key} was {old!r} then, is {new!r} now"
        for key, old, new in _changed(record.get("architecture", {}), current.architecture)
    ]
    warnings = [
        f"the base's {key} was {record[key]}, is {getattr(current, key)}"
        for key in ("dtype", "quantization")
        if record.get(key) is not None and record[key] != getattr(current, key)
    ]
    return problems, warnings


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Settings with different values; one that only one side has is a default of another version."""
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
