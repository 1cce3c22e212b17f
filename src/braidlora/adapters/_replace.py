"""Replacing an adapter by a new one of the same name, with nothing left of the old one."""

from __future__ import annotations

from typing import Any

from torch import nn

from braidlora.adapters._peft_compat import AuxiliaryTrainingWrapper
from braidlora.errors import ConfigError


def adapted_layers(model: nn.Module, adapter_name: str, layer_class: type[Any]) -> dict[Any, nn.Module]:
    """The layers that have an adapter of this name, on a model that is wrapped again, each with the adapter's A.

    Raises:
        ConfigError: it is merged: its weights are needed to take it out of the base.
    """
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ConfigError(
            f"the model has an adapter {adapter_name!r} that is merged into the base weights; call unmerge_adapter (or "
            "merge_and_unload, to keep the merged weights) before adding a new one of this name"
        )
    return {layer: layer.first_factor(adapter_name) for layer in layers if layer.has_adapter(adapter_name)}


def remove_leftovers(model: nn.Module, adapter_name: str, before: dict[Any, nn.Module]) -> None:
    """Remove the replaced adapter's layers, heads and tokens that the new adapter does not have.

    Args:
        before: from `adapted_layers`, before the new adapter was added; empty where it replaces none.
    """
    if not before:
        return
    for layer, factor in before.items():
        if layer.first_factor(adapter_name) is factor:
            layer.forget_adapter(adapter_name)
    # PEFT adds the new one's heads and tokens after this.
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, [])
            if not module._adapters:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.original_module)
