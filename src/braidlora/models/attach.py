"""Attaching an adapter to a base model: targets that exist, seeded initial weights, a base that stays unchanged."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from braidlora.config import RunConfig
from braidlora.errors import ConfigError
from braidlora.models.adapter_config import build_adapter_config
from braidlora.models.adapter_targets import fit_targets
from braidlora.models.head import new_modules


def attach_adapter(model: PreTrainedModel, config: RunConfig, seed: int) -> PeftModel:
    """Wrap `model` with the recipe's adapter, its initial weights drawn from `seed` alone.

    Torch's global generator is not advanced.

    Raises:
        ConfigError: a target module does not exist or is not a linear layer (the message names the nearest), or PEFT
            rejects the configuration.
    """
    adapter_config = build_adapter_config(config)
    if not isinstance(config.adapter.method, dict):
        fit_targets(
            adapter_config, model, config.adapter.target_modules, bool(config.adapter.target_parameters)
        )
    if config.prompt.packing and adapter_config.is_prompt_learning:
        raise ConfigError(
            f"prompt.packing: {adapter_config.peft_type.value} puts virtual tokens before a sequence, and packed rows "
            "share one. Set prompt.packing=false."
        )
    save_modules(model, adapter_config)
    adapter_config.revision = config.model.revision  # the base's, by which PEFT loads it again
    before = _checksums(model) if isinstance(config.adapter.method, dict) else []
    wrapped = wrap(model, adapter_config, seed)
    _refuse_edited_base(before, wrapped, adapter_config)
    return wrapped


def wrap(
    model: PreTrainedModel, adapter_config: PeftConfig, seed: int, adapter_name: str = "default"
) -> PeftModel:
    """`peft.get_peft_model`, with initial weights drawn from `seed` alone.

    Raises:
        ConfigError: PEFT rejects the configuration, or it has nothing to train.
    """
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # PEFT reads an attribute that newer transformers have renamed; users cannot change that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, adapter_config, adapter_name=adapter_name)
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            remedy = ""
            if "lora_dropout" in str(error):  # on experts, which target_modules=all-linear may include
                remedy = " PEFT's LoRA has no dropout on experts: set adapter.lora_dropout=0 (other methods have it)."
            raise ConfigError(
                f"adapter: PEFT cannot adapt {type(model).__name__} this way: {error}{remedy}"
            ) from error
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise ConfigError("adapter: this configuration has no trainable parameter; nothing would be trained.")
    return wrapped


def save_modules(model: PreTrainedModel, adapter_config: PeftConfig) -> None:
    """Have the adapter train and save a classifier's new modules; reject `modules_to_save` that do not exist.

    Raises:
        ConfigError: a module does not exist, or this type of adapter cannot train new modules.
    """
    # PEFT adds these two by itself.
    fresh = [name for name in new_modules(model) if name not in ("classifier", "score")]
    if "modules_to_save" not in {field.name for field in dataclasses.fields(adapter_config)}:
        if fresh:
            raise ConfigError(
                f"adapter.method: {adapter_config.peft_type.value} cannot train the classifier's new "
                f"{', '.join(fresh)}; choose another method."
            )
        return
    if fresh:
        adapter_config.modules_to_save = [*(adapter_config.modules_to_save or []), *fresh]
    _check_modules_to_save(model, adapter_config.modules_to_save)


def _check_modules_to_save(model: PreTrainedModel, names: list[str] | None) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in modules})
    for name in names or []:
        if not any(module == name or module.endswith("." + name) for module in modules):
            near = difflib.get_close_matches(name, leaves, n=3, cutoff=0.4)
            raise ConfigError(
                f"adapter.modules_to_save: {name!r} matches no module of this {model.config.model_type} model"
                + (f"; nearest: {', '.join(near)}." if near else ".")
            )


def _checksums(model: PreTrainedModel) -> list[tuple[str, Any, int]]:
    """Name, parameter and sum of the bits of every parameter of the base that has values (a plan's have none)."""
    return [
        (name, parameter, _bit_sum(parameter))
        for name, parameter in model.named_parameters()
        if parameter.device.type != "meta"
    ]


def _bit_sum(parameter: Any) -> int:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().contiguous().view(integers).sum(dtype=torch.int64))


def _refuse_edited_base(before: list[tuple[str, Any, int]], wrapped: PeftModel, config: PeftConfig) -> None:
    """A method may add parameters to the base, but not change existing ones.

    Raises:
        ConfigError: a parameter of the base changed or is gone.
    """
    present = {id(parameter) for parameter in wrapped.parameters()}
    edited = [
        name
        for name, parameter, bits in before
        if id(parameter) not in present or _bit_sum(parameter) != bits
    ]
    if edited:
        raise ConfigError(
            f"adapter.method: {config.peft_type.value} with these settings changes the base's own weights "
            f"({edited[0]}{' and others' if edited[1:] else ''}), which an adapter folder does not contain; choose a "
            "method that does not change them."
        )
