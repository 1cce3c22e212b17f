"""The factored LoRA of heterogeneous Fed-ALoRA: configuration, layer, PEFT tuner, and its plain LoRA of rank m."""

from __future__ import annotations

import math
from collections.abc import Mapping

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.adapters._factored_layer import FactoredLoraLayer, to_plain_lora
from braidlora.adapters._factored_model import FactoredLoraModel
from braidlora.errors import CheckpointError

__all__ = [
    "FactoredLoraConfig",
    "FactoredLoraLayer",
    "FactoredLoraModel",
    "factored_to_lora",
    "to_plain_lora",
]

_FACTORS = ("A", "M", "B1", "B2", "base")


def factored_to_lora(
    tensors: Mapping[str, Tensor], config: FactoredLoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The same adapter as a plain LoRA of rank m that PEFT loads without braidlora. Exact, and nothing d × k is formed.

    A' = M A, B' = B_base + B2 B1 and lora_alpha = s·m, so that its scaling lora_alpha / m is s. Other tensors
    (modules to save) stay as they are.

    Args:
        tensors: the adapter's state dict, as PEFT saves it.
        config: its configuration; `lora_dropout` and the target modules are taken over.

    Returns:
        The LoRA's state dict, and its configuration.

    Raises:
        CheckpointError: a layer's factors are not complete.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    converted = {}
    for name, tensor in tensors.items():
        layer, found, factor = name.removesuffix(".weight").rpartition(".factoredlora_")
        if found and factor in _FACTORS:
            layers.setdefault(layer, {})[factor] = tensor
        else:
            converted[name] = tensor
    if not layers:
        raise CheckpointError(
            "no factored LoRA among the tensors; expected names such as ….factoredlora_A.weight"
        )
    m, alphas = config.r_intermediate, {}
    for layer, factors in layers.items():
        missing = [f"factoredlora_{factor}" for factor in _FACTORS if factor not in factors]
        if missing:
            raise CheckpointError(f"{layer}: {', '.join(missing)} missing; the adapter is not complete")
        A, B = to_plain_lora(*(factors[factor] for factor in _FACTORS))
        converted[f"{layer}.lora_A.weight"] = A.contiguous()
        converted[f"{layer}.lora_B.weight"] = B.contiguous()
        module = layer.removeprefix("base_model.model.")
        alphas[module] = _scaling(config, module) * m
    common = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r) * m
    lora = LoraConfig(
        r=m,
        lora_alpha=common,
        alpha_pattern={module: alpha for module, alpha in alphas.items() if alpha != common},
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    return converted, lora


def _scaling(config: FactoredLoraConfig, module: str) -> float:
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)
