"""Scaling adapters at run time, PEFT's LoRA included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from braidlora.adapters._adapter_layer import AdapterLayer
from braidlora.adapters._peft_compat import LoraLayer
from braidlora.adapters.sharing import lora_scaling
from braidlora.errors import ConfigError


def scaled_layers(model: nn.Module, adapter_name: str) -> dict[str, float]:
    """The scaling of every layer, PEFT's LoRA included, where it was changed at run time; by the layer's name."""
    changed = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (AdapterLayer, LoraLayer)) and adapter_name in layer.scaling:
            configured = lora_scaling(
                layer.lora_alpha[adapter_name], layer.r[adapter_name], layer.use_rslora[adapter_name]
            )
            if float(layer.scaling[adapter_name]) != configured:
                changed[name] = float(layer.scaling[adapter_name])
    return changed


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every adapter of `model`, PEFT's LoRA included, within a `with` block.

    `peft.helpers.rescale_adapter_scale` does this for LoRA alone. A multiplier in [0, 1] interpolates between the
    base model and the adapted one, token by token.

    Raises:
        TypeError: the multiplier is not a number.
        ValueError: the model has no adapter to scale, or one is merged.
    """
    if not isinstance(multiplier, (int, float)) or isinstance(multiplier, bool):
        raise TypeError(f"multiplier is {multiplier!r}; it must be a number")
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, (AdapterLayer, LoraLayer))
    ]
    if not layers:
        raise ValueError("the model has neither LoRA nor braidlora adapters; there is nothing to scale")
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ConfigError(f"{', '.join(merged)}: merged, so no scaling applies; call unmerge_adapter first")
    before = [(layer, dict(layer.scaling)) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * multiplier for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)
