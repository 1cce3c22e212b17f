"""The factored LoRA of heterogeneous Fed-ALoRA: configuration, layer, PEFT tuner, and its plain LoRA of rank m."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.adapters._factored_layer import FactoredLoraLayer, to_plain_lora
from braidlora.adapters._factored_model import FactoredLoraModel
from braidlora.adapters._plain_lora import (
    lora_config,
    lora_tensors,
    split_factors,
)
from braidlora.adapters._registration import FACTORED_PREFIX
from braidlora.adapters.functional import at_least_float32
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
    """The same adapter as a plain LoRA of rank m that PEFT loads without braidlora. Exact; no d × k matrix is formed.

    A' = M A, B' = B_base + B2 B1 and lora_alpha = s·m, so its scaling lora_alpha / m is s. Other tensors (modules to
    save) are kept.

    Args:
        tensors: the adapter's state dict, as PEFT saves it.
        config: its configuration; `lora_dropout` and the target modules are taken over.

    Returns:
        The LoRA's state dict, and its configuration.

    Raises:
        CheckpointError: a layer's factors are incomplete.
    """
    layers, converted = split_factors(tensors, FACTORED_PREFIX, _FACTORS)
    if not layers:
        raise CheckpointError(
            "the tensors contain no factored LoRA; expected names such as ….factoredlora_A.weight"
        )
    for module, factors in layers.items():
        missing = [f"factoredlora_{factor}" for factor in _FACTORS if factor not in factors]
        if missing:
            raise CheckpointError(f"{module}: {', '.join(missing)} missing; the adapter is incomplete")
        A, B = to_plain_lora(*(at_least_float32(factors[factor]) for factor in _FACTORS))
        converted |= lora_tensors(module, A, B)
    ranks = dict.fromkeys(layers, config.r_intermediate)
    return converted, lora_config(config, ranks, {module: config.scaling_of(module) for module in layers})
