"""The key that was meant: `lr` is `training.learning_rate`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from braidlora.config._differences import section

# What other tools call it.
ELSEWHERE = {
    "lr": "training.learning_rate",
    "rate": "training.learning_rate",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "n_epochs": "training.epochs",
    "steps": "training.max_steps",
    "num_steps": "training.max_steps",
    "batch": "training.batch_size",
    "bs": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "grad_accum": "training.gradient_accumulation",
    "warmup": "training.warmup_steps",
    "lr_scheduler": "training.scheduler",
    "lr_scheduler_type": "training.scheduler",
    "optim": "training.optimizer",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "alpha": "adapter.lora_alpha",
    "dropout": "adapter.lora_dropout",
    "experts": "adapter.num_experts",
    "peft_type": "adapter.method",
    "modules": "adapter.target_modules",
    "max_length": "prompt.cutoff",
    "max_len": "prompt.cutoff",
    "max_seq_length": "prompt.cutoff",
    "cutoff_len": "prompt.cutoff",
    "base": "model.path",
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "output_dir": "output",
    "out": "output",
    "limit": "tasks.*.train.limit",
    "max_samples": "tasks.*.train.limit",
    "data": "tasks.NAME.data",
    "train_file": "tasks.NAME.train",
    "dataset": "tasks.NAME.train",
    "eval_batch_size": "evaluation.batch_size",
    "max_tokens": "evaluation.max_new_tokens",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "torch_dtype": "model.dtype",
    "rounds": "federation.rounds",
    "rule": "federation.rule",
}


def suggest_key(key: str, schema: type[BaseModel]) -> str | None:
    """The dotted key of `schema` that `key` most likely means, or None.

    The same last part counts first (`epochs` → `training.epochs`), then other tools' names, then similar spelling.
    """
    word = key.strip("-").replace("-", "_")
    known = list(keys_of(schema))
    last = word.rpartition(".")[2]
    same = [path for path in known if path.rpartition(".")[2] == last]
    if same:
        return same[0]
    top = {path.split(".")[0] for path in known}
    elsewhere = ELSEWHERE.get(last.lower())
    if elsewhere is not None and elsewhere.split(".")[0] in top:
        return elsewhere
    lasts = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = difflib.get_close_matches(last, lasts, n=1, cutoff=0.75)
    if near:
        return lasts[near[0]]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return near[0] if near else None


def keys_of(schema: Any, above: str = "") -> Iterator[str]:
    """The dotted keys of all sections, those of list items left out: `model.path`, …, `seed`, `output`."""
    for name, field in schema.model_fields.items():
        inner = section(field.annotation)
        if inner is None or name in ("tasks", "clients"):
            yield f"{above}{name}"
        else:
            yield from keys_of(inner, f"{above}{name}.")


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of the known words, upper and lower case alike; None if none is similar."""
    spelled = {one.lower(): one for one in known}
    near = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[near[0]] if near else None
