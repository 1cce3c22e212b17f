"""What belongs to one adapter: its parts in a layer as a whole, its scaling at run time, and making it anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from braidlora.errors import ConfigError


class AdapterParts:
    """Base of our layers: forgetting an adapter, and scaling one as PEFT's LoraLayer does."""

    if TYPE_CHECKING:  # the tuner layer's own and what PEFT gives it, which mypy does not follow
        adapter_layer_names: tuple[str, ...]
        other_param_names: tuple[str, ...]
        active_adapters: list[str]
        merged_adapters: list[str]
        r: dict[str, int]
        lora_alpha: dict[str, float]
        scaling: dict[str, float]
        use_rslora: dict[str, bool]

    # `peft.helpers.disable_input_dtype_casting` switches this; our layers cast their weights, and x only for wrappers.
    cast_input_dtype_enabled = True

    def forget_adapter(self, adapter_name: str) -> None:
        """Remove every module and setting of the adapter; which adapter is active stays as it is."""
        for name in self.adapter_layer_names + self.other_param_names:
            part = getattr(self, name)
            if adapter_name in part:
                del part[adapter_name]

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the adapter has weights in this layer."""
        return adapter_name in self.scaling

    def first_part(self, adapter_name: str) -> nn.Module:
        """The module that holds the adapter's first factor, by which a new adapter is known from an old one."""
        part: nn.Module = getattr(self, self.adapter_layer_names[0])[adapter_name]
        return part

    def configured_scaling(self, adapter_name: str) -> float:
        """s = alpha / r, or alpha / √r with rsLoRA."""
        r = self.r[adapter_name]
        return self.lora_alpha[adapter_name] / (math.sqrt(r) if self.use_rslora[adapter_name] else r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter by `scale` times what its configuration says; nothing if it is not in this layer."""
        if adapter in self.scaling:
            self._set_scaling(adapter, scale * self.configured_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self._set_scaling(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or set it back to what their configurations say."""
        for name in self.active_adapters:
            if name in self.scaling:
                self._set_scaling(
                    name, self.configured_scaling(name) if scale is None else self.scaling[name] / scale
                )

    def _set_scaling(self, adapter_name: str, scaling: float) -> None:
        if adapter_name in self.merged_adapters and scaling != self.scaling[adapter_name]:
            raise ConfigError(
                f"adapter {adapter_name!r} is merged into the base weights, so that another scaling would have no "
                "effect now and would be subtracted at unmerge; call unmerge_adapter first"
            )
        self.scaling[adapter_name] = scaling


def scaled_layers(model: nn.Module, adapter_name: str) -> dict[str, float]:
    """The scaling of every layer where it was changed at run time, by the layer's name; of PEFT's LoRA as well."""
    changed = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (AdapterParts, LoraLayer)) and adapter_name in layer.scaling:
            r = layer.r[adapter_name]
            configured = layer.lora_alpha[adapter_name] / (
                math.sqrt(r) if layer.use_rslora[adapter_name] else r
            )
            if float(layer.scaling[adapter_name]) != configured:
                changed[name] = float(layer.scaling[adapter_name])
    return changed


def rank_and_alpha(config: Any, module: str) -> tuple[int, float]:
    """A module's rank and alpha, after `rank_pattern` and `alpha_pattern`.

    Args:
        module: its full name in the base model.
    """
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    return r, config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)


def adapter_weights(model: nn.Module, adapter_name: str, layer_class: type[Any]) -> dict[Any, nn.Module]:
    """The layers that have an adapter of this name, as on a model that is wrapped again, with a part of each.

    Raises:
        ConfigError: it is merged, so that its weights are still needed to take it out of the base.
    """
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ConfigError(
            f"the model has an adapter {adapter_name!r} that is merged into the base weights; call unmerge_adapter (or "
            "merge_and_unload, to keep the merged weights) before making it anew"
        )
    return {layer: layer.first_part(adapter_name) for layer in layers if layer.has_adapter(adapter_name)}


def forget_what_is_left(model: nn.Module, adapter_name: str, before: dict[Any, nn.Module]) -> None:
    """Of an adapter that was made anew: the old one's layers, heads and tokens that the new one does not have.

    Args:
        before: from `adapter_weights`; empty where there was no such adapter.
    """
    if not before:
        return
    for layer, part in before.items():
        if layer.first_part(adapter_name) is part:
            layer.forget_adapter(adapter_name)
    # PEFT adds the new one's heads and tokens after this.
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, [])
            if not module._adapters:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.original_module)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of every adapter of `model` within a `with` block, of PEFT's LoRA as well as ours.

    What `peft.helpers.rescale_adapter_scale` does for LoRA alone. A multiplier in [0, 1] interpolates between the
    base model and the adapted one, token by token.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no adapters that could be scaled, or one is merged.
    """
    if not isinstance(multiplier, (int, float)) or isinstance(multiplier, bool):
        raise TypeError(f"multiplier is {multiplier!r}; it must be a number")
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, (AdapterParts, LoraLayer))
    ]
    if not layers:
        raise ValueError("the model has no LoRA and no braidlora adapters, so that there is nothing to scale")
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ConfigError(
            f"{', '.join(merged)}: merged, so that no scaling applies; call unmerge_adapter first"
        )
    before = [(layer, dict(layer.scaling)) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * multiplier for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)
