"""The communication table of arXiv 2509.25414, computed from the two models' dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from braidlora.federated import AdaptedLayer, get_rule
from braidlora.federated.protocol.communication import mean_parameters, traffic
from braidlora.plan.layers import adapted_layers

TARGETS = {"llama-2-7b": ["q_proj", "v_proj"], "qwen2-7b": ["q_proj", "o_proj"]}
CLIENTS, RANK = 8, 8
RANKS = (64, 64, 32, 32, 16, 16, 8, 8)
R_INTERMEDIATE = 16
# The paper counts its heterogeneous method in two ways: what goes up, and the model whose row is counted that way.
ACCOUNTINGS = {
    "B1, B2 and M up": (("factoredlora_B1", "factoredlora_B2", "factoredlora_M"), "llama-2-7b"),
    "B2 alone up": (("factoredlora_B2",), "qwen2-7b"),
}


def plan_paper() -> dict[str, Any]:
    """Parameters per client and round, up and down together, averaged over the clients.

    Returns:
        `{"plan": "paper", "homogeneous": {"ranks", "models": {model: {rule: parameters}}}, "heterogeneous": {"ranks",
        "r_intermediate", "models": {model: {"zero-padding", "fed-alora-het": {how counted: parameters}}}}}`.
    """
    homogeneous, heterogeneous = {}, {}
    for model, targets in TARGETS.items():
        layers = adapted_layers(model, targets)
        homogeneous[model] = {
            rule: _mean(layers, rule, [RANK] * CLIENTS) for rule in ("fedit", "fedsa-lora", "fed-alora")
        }
        counted = {
            how: mean_parameters(
                layers, RANKS, [*factors, "factoredlora_base"], r_intermediate=R_INTERMEDIATE
            )
            for how, (factors, _) in ACCOUNTINGS.items()
        }
        travels = {
            f"as sent: {wire}": _mean(layers, "fed-alora-het", RANKS, wire=wire)
            for wire in ("factors", "smallest")
        }
        heterogeneous[model] = {
            "zero-padding": _mean(layers, "zero-padding", RANKS),
            "fed-alora-het": {**counted, **travels},
        }
    return {
        "plan": "paper",
        "target_modules": TARGETS,
        "homogeneous": {"ranks": [RANK] * CLIENTS, "models": homogeneous},
        "heterogeneous": {
            "ranks": list(RANKS),
            "r_intermediate": R_INTERMEDIATE,
            "printed": {model: how for how, (_, model) in ACCOUNTINGS.items()},
            "models": heterogeneous,
        },
    }


def _mean(layers: Sequence[AdaptedLayer], rule: str, ranks: Sequence[int], **settings: str) -> float:
    sent = traffic(get_rule(rule, r_intermediate=R_INTERMEDIATE, **settings), layers, ranks)
    return math.fsum(one.parameters for one in sent) / len(sent)
