"""The linear layers that an adapter would adapt, from a model's config.json alone."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn

from braidlora.adapters._peft_compat import BaseTunerLayer
from braidlora.errors import ConfigError
from braidlora.federated import AdaptedLayer
from braidlora.models.skeleton import skeleton


def adapted_layers(
    model: str | Path | nn.Module, target_modules: list[str] | set[str] | str | None = None
) -> list[AdaptedLayer]:
    """Name, d and k of every linear layer that `target_modules` name, in the model's order.

    Names are those of a PEFT state dict (`base_model.model.…`). PEFT itself matches them, so lists of names, regular
    expressions, "all-linear" and, for a known architecture, None mean what they mean there. If `model` is a module,
    it keeps the adapter that this attaches.

    Raises:
        ConfigError: the configuration is not usable, or nothing matches.
    """
    network = model if isinstance(model, nn.Module) else skeleton(model)
    config = LoraConfig(r=1, target_modules=target_modules)
    try:
        adapted = get_peft_model(network, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"target_modules {target_modules!r}: {error}") from error
    return layers_of(adapted)


def layers_of(model: nn.Module) -> list[AdaptedLayer]:
    """Name, d and k of every adapted layer of a PEFT model."""
    return [
        AdaptedLayer(name, module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
