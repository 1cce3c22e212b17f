"""The multi-LoRA adapter: configuration, layer, PEFT tuner, and its plain LoRA under fixed expert weights."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

from braidlora.adapters import functional, task_gates
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
from braidlora.errors import CheckpointError, ConfigError

__all__ = [
    "MultiLoraConfig",
    "MultiLoraExperts",
    "MultiLoraLayer",
    "MultiLoraModel",
    "MultiLoraParameter",
    "multi_to_lora",
]


def multi_to_lora(
    tensors: Mapping[str, Tensor],
    config: MultiLoraConfig,
    weights: Tensor | Mapping[str, Tensor] | None = None,
    task: str | None = None,
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter with fixed expert weights, as a plain LoRA that PEFT loads without braidlora.

    Exact with one expert, with a gate by task for that `task`, and with a uniform gate. Otherwise an approximation,
    which replaces w(x) by a constant and drops the routers. Modules to save and biases are kept.

    Args:
        tensors: the adapter's state dict, as PEFT saves it.
        config: its configuration.
        weights: (N,) for all modules, or by the module's full name in the base model; for the parameter of E stacked
            experts (N,) or (E, N). Not needed where the gate does not read the token.
        task: of a gate or map by task.

    Returns:
        The LoRA's state dict, and its configuration.

    Raises:
        CheckpointError: a layer's factors are incomplete, or PEFT could not load the LoRA.
        ConfigError: the adapter needs a task, or does not have this one.
    """
    layers, converted = split_factors(tensors, "multi-LoRA", PREFIX, ("A", "router", "B", "map"))
    number = _task_number(config, task)
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
        factors, w_N = _at_task(factors, config, number, weights, module)
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


def _task_number(config: MultiLoraConfig, task: str | None) -> int:
    names = config.task_names or []
    if config.by_task and task not in names:
        got = "no task was given" if task is None else f"the adapter was not trained on task {task!r}"
        raise ConfigError(
            f"{got}; this adapter is a different LoRA for each of its tasks: {', '.join(names)}."
        )
    return names.index(task) if config.by_task and task is not None else 0


def _at_task(
    factors: Mapping[str, Tensor],
    config: MultiLoraConfig,
    number: int,
    weights: Tensor | Mapping[str, Tensor] | None,
    module: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """A module's factors with Λ_t multiplied into A, and its expert weights (N,)."""
    own = dict(factors)
    if config.task_map:
        if "map" not in own:
            raise CheckpointError(f"{module}: {PREFIX}map missing; the adapter is incomplete")
        own["A"] = task_gates.with_map(functional.at_least_float32(own["A"]), own["map"], number)
    if config.gate == "task" and config.num_experts > 1:
        if "router" not in own:
            raise CheckpointError(f"{module}: {PREFIX}router missing; the adapter is incomplete")
        return own, task_gates.task_weights(own["router"], config.router_temperature)[number]
    if config.gate == "uniform" or weights is None:
        return own, task_gates.uniform_weights(config.num_experts, own["A"])
    return own, weights if isinstance(weights, Tensor) else weights[module]
