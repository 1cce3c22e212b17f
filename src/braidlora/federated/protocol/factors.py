"""The factors of an adapter: their names in a state dict, and their shapes. Imports no torch.

A tensor is called LAYER.FACTOR.weight, e.g. `base_model.model.layers.0.self_attn.q_proj.lora_B.weight`. Shapes: a layer
maps k = in_features to d = out_features; r is the client's rank, m the intermediate rank of the factored form. The
mixer has a row for the client's own LoRA and one for the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

Axis = Literal["d", "k", "r", "m", "2"]

AXES: dict[str, tuple[Axis, Axis]] = {
    "lora_A": ("r", "k"),
    "lora_B": ("d", "r"),
    "factoredlora_A": ("r", "k"),
    "factoredlora_M": ("m", "r"),
    "factoredlora_B1": ("r", "m"),
    "factoredlora_B2": ("d", "r"),
    "factoredlora_base": ("d", "m"),
    # B2 B1, where the product is smaller on the wire than its factors.
    "factoredlora_product": ("d", "m"),
    # The frozen mean of other clients' A and B next to a client's own, and the router that weighs the two.
    "rest_A": ("r", "k"),
    "rest_B": ("d", "r"),
    "mixer": ("2", "k"),
}
# What an adapter consists of: as plain LoRA, as factored LoRA, and as a pair of LoRAs.
LORA = ("lora_A", "lora_B")
FACTORED = ("factoredlora_A", "factoredlora_M", "factoredlora_B1", "factoredlora_B2", "factoredlora_base")
REST = ("rest_A", "rest_B")
PAIR = (*LORA, *REST, "mixer")
# Updates of earlier rounds that a client keeps frozen next to its own adapter, as a stack of any rank.
CARRIED = ("carried_A", "carried_B")
# Factors that start at zero, so that ΔW = 0; the others start Kaiming-uniform (a = √5).
ZERO_AT_START = frozenset({"lora_B", "rest_B", "factoredlora_B2", "factoredlora_base"})


class AdaptedLayer(NamedTuple):
    """A linear layer that has an adapter: its name in the state dict, d and k."""

    name: str
    out_features: int
    in_features: int


@lru_cache(maxsize=2**16)  # a server splits every name several times per client and round
def split(name: str) -> tuple[str, str]:
    """(layer, factor) of a tensor's name; the factor is "" for a name of another form than LAYER.FACTOR.weight."""
    stem, dot, last = name.rpartition(".")
    if not dot or last != "weight":
        return name, ""
    layer, _, factor = stem.rpartition(".")
    return layer, factor


def join(layer: str, factor: str) -> str:
    """The name of a layer's factor."""
    return f"{layer}.{factor}.weight" if layer else f"{factor}.weight"


def layers_of(names: Iterable[str], factors: Collection[str]) -> list[str]:
    """The layers of tensors that are one of these factors, in the order of their names."""
    return sorted({layer for layer, factor in map(split, names) if factor in factors})


def factor_shapes(
    layers: Iterable[AdaptedLayer], factors: Iterable[str], rank: int, r_intermediate: int
) -> dict[str, tuple[int, int]]:
    """Shapes of the given factors in all layers, by tensor name."""
    factors = tuple(factors)
    shapes = {}
    for layer in layers:
        size = {"d": layer.out_features, "k": layer.in_features, "r": rank, "m": r_intermediate, "2": 2}
        for factor in factors:
            first, second = AXES[factor]
            shapes[join(layer.name, factor)] = (size[first], size[second])
    return shapes
