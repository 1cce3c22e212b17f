"""Everything that a run needs, loaded and checked before the first byte is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from braidlora.config import RunConfig
from braidlora.models.adapter_config import build_adapter_config
from braidlora.models.attach import attach_adapter
from braidlora.models.base import check_cutoff, enable_gradient_checkpointing, load_base
from braidlora.models.identity import base_record
from braidlora.models.old_fingerprints import sampled_fingerprint
from braidlora.runs import AdapterCard
from braidlora.tasks import (
    PARTS,
    LabelSpace,
    MixingSampler,
    MultiTaskDataset,
    Part,
    Task,
    adapter_card,
    check_chat_settings,
    check_packing,
    encode_tasks,
    fingerprints,
    load_tasks,
)
from braidlora.tasks.checks import warn_of_lengths, warn_of_prompts, warn_of_rows
from braidlora.tasks.class_weights import class_weights
from braidlora.training.checkpoint import Identity, encoded_fingerprint

# Raises if the run could not be evaluated later: of the base model, its tokenizer, the tasks and the recipe.
Check = Callable[[Any, Any, list[Task], RunConfig], None]


@dataclass
class Prepared:
    """What a run trains on and with.

    Attributes:
        model: with its adapter attached.
        datasets: encoded rows of `train` and `validation`.
        identity: what a checkpoint must match to be resumed.
        sampled: the base's `sampled_fingerprint`, for checkpoints of braidlora 0.1.
        card: what the adapter will say of itself.
        class_weights: of the labels in each task's loss, if a task has some.
        warnings: what is probably wrong with the rows.
    """

    tasks: list[Task]
    label_space: LabelSpace | None
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    datasets: dict[Part, MultiTaskDataset]
    sampler: MixingSampler
    identity: Identity
    sampled: str
    card: AdapterCard
    class_weights: Tensor | None
    warnings: list[str]


def prepare(config: RunConfig, check: Check | None = None) -> Prepared:
    """Load tasks and base, encode the rows, and attach the adapter.

    Raises:
        ConfigError, DataError: the recipe or its data cannot be used.
        TrainingError: the base does not fit into memory.
    """
    tasks = load_tasks(config)
    check_chat_settings(tasks, config.prompt)
    label_space = LabelSpace.of(tasks) if config.kind == "classify" else None
    weights = class_weights(config, tasks, label_space)
    warnings = warn_of_rows(tasks, config)
    if isinstance(config.adapter.method, dict):
        build_adapter_config(config)  # PEFT's own settings are checked before a large base is loaded
    set_seed(config.seed)
    base, tokenizer = load_base(config.model, label_space)
    check_cutoff(base, config)
    if check is not None:
        check(base, tokenizer, tasks, config)
    if config.prompt.packing:
        check_packing(base, config.prompt.cutoff)
    datasets: dict[Part, MultiTaskDataset] = {
        part: encode_tasks(tasks, tokenizer, config.prompt, part, label_space)
        for part in PARTS
        if part != "test"
    }
    warnings += warn_of_lengths(datasets, config) + warn_of_prompts(tasks, tokenizer, config)
    data = {
        **fingerprints(tasks),
        "encoded": {part: encoded_fingerprint(rows) for part, rows in datasets.items()},
    }
    record, sampled = base_record(base, config.model), sampled_fingerprint(base)
    identity = Identity.of(config, data, record, world_size())
    card = adapter_card(tasks, label_space, record, config, tokenizer)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    model = attach_adapter(base, config, config.seed)
    rows_per_step = config.training.batch_size * config.training.gradient_accumulation * world_size()
    sampler = MixingSampler(datasets["train"], config.mixing, config.seed, rows_per_step)
    return Prepared(
        tasks, label_space, model, tokenizer, datasets, sampler, identity, sampled, card, weights, warnings
    )


def world_size() -> int:
    """How many processes train together, as torchrun and `accelerate launch` set it before any group is formed."""
    return int(os.environ.get("WORLD_SIZE", "1"))
