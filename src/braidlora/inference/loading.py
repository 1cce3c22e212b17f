"""From a path to a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braidlora.inference.model import Model
from braidlora.inference.target import Target, find_target


def load(target: str | Path, *, base: str | Path | None = None, recipe: str | Path | None = None) -> Model:
    """A trained model that predicts and generates.

    The base model is loaded from safetensors; code that comes with a model is never run. The model goes to the GPU if
    there is one.

    Args:
        target: a run directory, one of its checkpoints, an adapter folder, an export, a merged model, a federation's
            client (`RUN/clients/NAME`), a comparison's run (`RUN/cells/NAME`), or a base model (folder, hub name,
            `embedded`).
        base: the base model, if it is not where the adapter says.
        recipe: tasks and prompts of an adapter that does not record them (from an earlier version, or from plain PEFT).

    Raises:
        ConfigError: the target is none of these, or its base cannot be found.
        CheckpointError: the adapter is missing, damaged, pickled, or made for another base.
        TrainingError: the model does not fit into memory.
    """
    return load_target(find_target(target, base=base, recipe=recipe))


def load_target(target: Target) -> Model:
    """The model that `find_target` found."""
    import torch

    from braidlora.models.adapter_reader import load_adapter, open_adapter
    from braidlora.models.base import load_base

    folder, section = target.origin.folder, target.section
    if target.chat_template is not None:
        section = section.model_copy(update={"chat_template": None})  # its file may have changed, or be gone
    if folder is not None:
        open_adapter(folder)  # what is wrong with it shows before a large base is loaded
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        model: Any
        model, tokenizer = load_base(section, target.label_space)
    if folder is not None:
        target.origin.check_base(model, section, "--base PATH")
        model = load_adapter(model, folder)
    if torch.cuda.is_available() and target.section.quantization == "none":
        model.to("cuda")
    if target.chat_template is not None:
        tokenizer.chat_template = target.chat_template  # rendered in transformers' sandbox
    return Model(target, model.eval(), tokenizer)
