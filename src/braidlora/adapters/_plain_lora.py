"""Converting our adapters to a LoRA that PEFT loads without braidlora: names, ranks, configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from peft import LoraConfig
from torch import Tensor

from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.errors import CheckpointError

T = TypeVar("T")
_ROOT = "base_model.model."  # precedes a module's name in PEFT's state dicts


def split_factors(
    tensors: Mapping[str, Tensor], kind: str, prefix: str, factors: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A state dict as {module: {factor: tensor}} and all other tensors (modules to save, biases).

    Args:
        kind: of the adapter, for messages.
        prefix: `braidlora_` or `factoredlora_`.
        factors: names after the prefix, e.g. A, router, B; every module has all but the router and the map.

    Raises:
        CheckpointError: there are none, or a module lacks one.
    """
    known = {f"{prefix}{factor}": factor for factor in factors}
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor in known:
            layers.setdefault(module.removeprefix(_ROOT), {})[known[factor]] = tensor
        else:
            others[name] = tensor
    if not layers:
        raise CheckpointError(f"the tensors hold no {kind}; expected names such as ….{prefix}A.weight")
    needed = {name: factor for name, factor in known.items() if factor not in ("router", "map")}
    for module, found in layers.items():
        if missing := [name for name, factor in needed.items() if factor not in found]:
            raise CheckpointError(f"{module}: {', '.join(missing)} missing; the adapter is incomplete")
    return layers, others


def lora_tensors(module: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """PEFT's names for a module's A (r, k) and B (d, r)."""
    return {
        f"{_ROOT}{module}.lora_A.weight": A.contiguous(),
        f"{_ROOT}{module}.lora_B.weight": B.contiguous(),
    }


def lora_config(
    config: MultiLoraConfig | FactoredLoraConfig,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    parameters: Iterable[str] = (),
) -> LoraConfig:
    """The LoRA's configuration: the rank and lora_alpha = s·rank of most modules, and patterns for the others.

    Args:
        config: that of the converted adapter; common settings are taken over.
        ranks, scalings: those of the LoRA, by the full name of the module or parameter.
        parameters: which of these names are parameters.
    """
    alphas = {module: _whole(scalings[module] * rank) for module, rank in ranks.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={_exactly(module): other for module, other in ranks.items() if other != rank},
        alpha_pattern={_exactly(module): other for module, other in alphas.items() if other != alpha},
        # PEFT's LoRA has no dropout on parameters, and matches them by name alone, regardless of exclusions.
        lora_dropout=0.0 if parameters else config.lora_dropout,
        target_parameters=sorted(parameters) or None,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
    )


def _exactly(module: str) -> str:
    # PEFT treats a key as a regular expression and a suffix; this one fits a single module.
    return f"^{re.escape(module)}"


def _whole(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]
