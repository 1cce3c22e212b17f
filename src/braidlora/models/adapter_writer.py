"""Adapter folders in PEFT's format, written so that the same adapter gives the same bytes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

from braidlora.models.model_card import hub_name_of_base, model_card
from braidlora.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CARD, AdapterCard


def save_adapter(
    model: PeftModel,
    directory: Path,
    state_dict: dict[str, Tensor] | None = None,
    card: AdapterCard | None = None,
) -> None:
    """Save a model's adapter into the folder `directory`: weights, configuration, README and `braidlora.json`.

    Args:
        state_dict: the adapter's tensors where the model's own are sharded over processes.
        card: the content of `braidlora.json`; None writes none.
    """
    # PEFT's own card takes it time at every save, and is replaced by ours.
    model.create_or_update_model_card = lambda directory: None
    try:
        model.save_pretrained(
            str(directory), safe_serialization=True, save_embedding_layers=False, state_dict=state_dict
        )
    finally:
        del model.create_or_update_model_card
    _finish_adapter(directory, model.peft_config["default"], card)


def write_adapter(
    directory: Path, tensors: Mapping[str, Tensor], config: PeftConfig, card: AdapterCard | None = None
) -> None:
    """Write an adapter that is not attached to a model, from its tensors by PEFT's names."""
    contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(contiguous, str(directory / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    _finish_adapter(directory, config, card)


def _finish_adapter(directory: Path, config: PeftConfig, card: AdapterCard | None) -> None:
    """Put the configuration into a fixed order (PEFT writes sets in hash order), and write README and card."""
    path = directory / ADAPTER_CONFIG
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name in saved:
        if isinstance(getattr(config, name, None), set):
            saved[name] = sorted(saved[name])
    if (name := hub_name_of_base(card)) is not None:
        saved["base_model_name_or_path"] = name  # not the folder that was read on this machine
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / MODEL_CARD).write_text(model_card(saved, card), encoding="utf-8")
    if card is not None:
        card.write(directory)
    # safetensors makes files that only their owner can read.
    shutil.copymode(path, directory / ADAPTER_WEIGHTS)
