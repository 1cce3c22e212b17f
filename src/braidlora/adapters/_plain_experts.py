"""Adapters of stacked experts in the form of PEFT's LoRA with `target_parameters`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters.functional import stacked_ranks
from braidlora.errors import CheckpointError

_ORDER = ("gate_up_proj", "up_proj", "down_proj")  # of the parameters in an experts module
# Names of linear layers that PEFT always takes for the experts of an older Mixtral or Qwen-MoE.
_TAKEN_FOR_EXPERTS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


def stacked_experts(config: MultiLoraConfig, name: str, A: Tensor) -> int:
    """How many of the base's experts the adapter of `name` covers, by the rows of its A; 1 for a linear layer.

    Args:
        name: of the module, or parameter, in the base model.
        A: (E·G, k), as saved.
    """
    r, _ = config.rank_and_alpha(name)
    rows, _ = stacked_ranks(config.share, config.num_experts, r)
    named = any(name == target or name.endswith(f".{target}") for target in config.target_parameters or [])
    return A.shape[0] // rows if named else 1


def join_as_peft(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(E·r, k) and (d, r·E): in PEFT's B the expert is the inner index of a column."""
    A = torch.cat([A for A, _ in factors])
    B = torch.stack([B for _, B in factors], -1).flatten(1)
    return A, B


def wrapper_names(parameters: Iterable[str]) -> dict[str, str]:
    """Where PEFT keeps the LoRA of each parameter: a module's wrappers are nested, the first innermost."""
    modules: dict[str, list[str]] = {}
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    names = {}
    for module, leaves in modules.items():
        ordered = sorted(leaves, key=_ORDER.index)
        for depth, leaf in enumerate(reversed(ordered)):
            names[f"{module}.{leaf}"] = module + ".base_layer" * depth
    return names


def check_targets_survive(modules: Iterable[str]) -> None:
    """Raise CheckpointError for linear layers that PEFT would take for experts when loading the LoRA."""
    taken = sorted(name for name in modules if name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS)
    if taken:
        raise CheckpointError(
            f"{taken[0]}: PEFT mistakes linear layers of this name for experts of the base, so a LoRA on them and on "
            f"experts cannot be loaded ({len(taken)} such layers). Train the adapter without them, or keep it: "
            "`import braidlora; PeftModel.from_pretrained` loads it."
        )
