"""The multi-LoRA adapter: configuration, layer, PEFT tuner, and its plain LoRA under fixed expert weights."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

from braidlora.adapters import functional
from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters._experts import MultiLoraExperts, MultiLoraParameter
from braidlora.adapters._layer import MultiLoraLayer
from braidlora.adapters._model import MultiLoraModel
from braidlora.adapters._plain_experts import (
    check_targets_survive,
    join_as_peft,
    stacked_experts,
    wrapper_names,
)
from braidlora.adapters._plain_lora import lora_config, lora_tensors, split_factors
from braidlora.adapters._registration import PREFIX

__all__ = [
    "MultiLoraConfig",
    "MultiLoraExperts",
    "MultiLoraLayer",
    "MultiLoraModel",
    "MultiLoraParameter",
    "multi_to_lora",
]


def multi_to_lora(
    tensors: Mapping[str, Tensor], config: MultiLoraConfig, weights: Tensor | Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter with fixed expert weights, as a plain LoRA that PEFT loads without braidlora.

    Exact with one expert. Otherwise an approximation, which replaces w(x) by a constant and drops the routers. Modules
    to save and biases are kept.

    Args:
        tensors: the adapter's state dict, as PEFT saves it.
        config: its configuration.
        weights: (N,) for all modules, or by the module's full name in the base model; for the parameter of E stacked
            experts (N,) or (E, N).

    Returns:
        The LoRA's state dict, and its configuration.

    Raises:
        CheckpointError: a layer's factors are incomplete, or PEFT could not load the LoRA.
    """
    layers, converted = split_factors(tensors, "multi-LoRA", PREFIX, ("A", "router", "B"))
    ranks = {}
    stacks = {
        module: experts
        for module, factors in layers.items()
        if (experts := stacked_experts(config, module, factors["A"])) > 1
    }
    if stacks:
        check_targets_survive(layers.keys() - stacks.keys())
    wrappers = wrapper_names(stacks)
    for module, factors in layers.items():
        w_N = weights if isinstance(weights, Tensor) else weights[module]
        if module in stacks:
            experts = stacks[module]
            blocks = factors["A"].chunk(experts, 0), factors["B"].chunk(experts, 1), w_N.expand(experts, -1)
            fixed = [
                functional.static_factors(A, B, w, config.share) for A, B, w in zip(*blocks, strict=True)
            ]
            converted |= lora_tensors(wrappers[module], *join_as_peft(fixed))
            ranks[module] = fixed[0][0].shape[0]
            continue
        A, B = functional.static_factors(factors["A"], factors["B"], w_N, config.share)
        converted |= lora_tensors(module, A, B)
        ranks[module] = A.shape[0]
    scalings = {module: config.scaling_of(module) for module in layers}
    return converted, lora_config(config, ranks, scalings, stacks)
