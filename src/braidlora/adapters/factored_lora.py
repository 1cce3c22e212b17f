"""The factored LoRA of heterogeneous Fed-ALoRA: configuration, layer, PEFT tuner, and its plain LoRA of rank m."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.adapters._factored_layer import FactoredLoraLayer, Factors, to_plain_lora
from braidlora.adapters._plain_lora import lora_config, lora_tensors, split_factors
from braidlora.adapters._registration import FACTORED_NAME, FACTORED_PREFIX, register
from braidlora.adapters._tuner import LinearTuner
from braidlora.adapters.functional import at_least_float32

__all__ = [
    "FactoredLoraConfig",
    "FactoredLoraLayer",
    "FactoredLoraModel",
    "factored_to_lora",
    "to_plain_lora",
]


class FactoredLoraLinear(FactoredLoraLayer):
    """The layer that replaces a linear layer.

    The name matters: PEFT includes an adapted layer in "all-linear" if its class name contains "Linear".
    """


class FactoredLoraModel(LinearTuner):
    """PEFT tuner of type FACTOREDLORA; `peft.get_peft_model` with a `FactoredLoraConfig` makes one.

    Raises:
        ConfigError: `target_modules` match nothing, or something that is not a linear layer.
    """

    prefix = FACTORED_PREFIX
    tuner_layer_cls = FactoredLoraLayer
    linear_cls = FactoredLoraLinear


register(FACTORED_NAME, FACTORED_PREFIX, FactoredLoraConfig, FactoredLoraModel)


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
    layers, converted = split_factors(tensors, "factored LoRA", FACTORED_PREFIX, Factors._fields)
    for module, factors in layers.items():
        A, B = to_plain_lora(*(at_least_float32(factors[factor]) for factor in Factors._fields))
        converted |= lora_tensors(module, A, B)
    ranks = dict.fromkeys(layers, config.r_intermediate)
    return converted, lora_config(config, ranks, {module: config.scaling_of(module) for module in layers})
