"""The factors of an adapter: their names in a state dict, and their shapes.

A tensor is called LAYER.FACTOR.weight, e.g. `base_model.model.layers.0.self_attn.q_proj.lora_B.weight`. Shapes: a layer
maps k = in_features to d = out_features; r is the client's rank, m the intermediate rank of the heterogeneous rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Axis = Literal["d", "k", "r", "m"]
Redraw = Literal["zeros", "kaiming"]

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
}


class AdaptedLayer(NamedTuple):
    """A linear layer that carries an adapter: its name in the state dict, d and k."""

    name: str
    out_features: int
    in_features: int


@lru_cache(maxsize=2**16)  # a server takes every name apart several times a client and round
def split(name: str) -> tuple[str, str]:
    """(layer, factor) of a tensor's name; the factor is "" where the name is not of the form LAYER.FACTOR.weight."""
    stem, dot, last = name.rpartition(".")
    if not dot or last != "weight":
        return name, ""
    layer, _, factor = stem.rpartition(".")
    return layer, factor


def join(layer: str, factor: str) -> str:
    """The name of a layer's factor."""
    return f"{layer}.{factor}.weight" if layer else f"{factor}.weight"


def factor_shapes(
    layers: Iterable[AdaptedLayer], factors: Iterable[str], rank: int, r_intermediate: int
) -> dict[str, tuple[int, int]]:
    """Shapes of the given factors in all layers, by tensor name."""
    factors = tuple(factors)
    shapes = {}
    for layer in layers:
        size = {"d": layer.out_features, "k": layer.in_features, "r": rank, "m": r_intermediate}
        for factor in factors:
            first, second = AXES[factor]
            shapes[join(layer.name, factor)] = (size[first], size[second])
    return shapes


def redraw(
    tensors: Mapping[str, Tensor], how: Mapping[str, Redraw], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A copy of `tensors` in which the factors named in `how` start anew: zero, or Kaiming-uniform(a = √5).

    Tensors are drawn in the order of their names, so a seeded generator gives the same values for the same names.
    """
    drawn = dict(tensors)
    for name in sorted(tensors):
        start = how.get(split(name)[1])
        if start is None:
            continue
        fresh = torch.zeros_like(tensors[name])
        if start == "kaiming":
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        drawn[name] = fresh
    return drawn
