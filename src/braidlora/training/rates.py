"""Learning rates of the factors: A, B and router as multiples of one rate (LoRA+, arXiv 2402.12354, raises B's)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any, Literal

from torch import nn

from braidlora.config import RateMultipliers

Factor = Literal["A", "B", "router", "other"]
_FACTORS: tuple[tuple[Factor, re.Pattern[str]], ...] = (
    ("router", re.compile(r"\w+_router\.")),
    ("A", re.compile(r"\w*(lora|adalora|shira)_(embedding_)?A\.")),
    ("B", re.compile(r"\w*(lora|adalora|shira)_(embedding_)?B[12]?\.")),
)


def factor_of(name: str) -> Factor:
    """Which factor of an adapter the parameter `name` belongs to: `….braidlora_A.default.weight` is an A."""
    for factor, pattern in _FACTORS:
        if pattern.search(name):
            return factor
    return "other"


def parameter_groups(
    model: nn.Module,
    multipliers: RateMultipliers,
    learning_rate: float,
    weight_decay: float,
    decayed: set[str],
    other_rounds: Collection[Factor] = (),
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: one per factor, and per factor those without weight decay.

    Args:
        model: a PEFT model.
        multipliers: of A, B and router; everything else (a classification head) uses the plain rate.
        learning_rate: the plain rate.
        weight_decay: for the parameters in `decayed`; the others have none.
        decayed: names of parameters with weight decay.
        other_rounds: factors that other rounds of a federation train, so that their multipliers are not ignored.
    """
    rates: dict[str, float] = {**multipliers.model_dump(), "other": 1.0}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factor_of(name)
        group = groups.setdefault(
            (factor, name in decayed),
            {
                "params": [],
                "lr": learning_rate * rates[factor],
                "weight_decay": weight_decay if name in decayed else 0.0,
                "factor": factor,
                "rate_multiplier": rates[factor],
            },
        )
        group["params"].append(parameter)
    trained = {*other_rounds, *(factor for factor, _ in groups)}
    for kind, rate in rates.items():
        if rate != 1.0 and kind not in trained:
            message = f"training.rate_multipliers.{kind} is ignored: no {kind} is trained"
            warnings.warn(message, stacklevel=2)
    return [groups[key] for key in sorted(groups)]
