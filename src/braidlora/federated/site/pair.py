"""The pair of LoRAs that a client has under fedalt: a multi-LoRA of two experts, of which the second one is frozen.

braidlora_A (2r, k) = [lora_A; rest_A]     braidlora_B (d, 2r) = [lora_B, rest_B]     braidlora_router (2, k) = mixer
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from braidlora.adapters import MultiLoraConfig, MultiLoraLayer
from braidlora.federated.protocol.factors import join, layers_of

FACTORS = ("braidlora_A", "braidlora_router", "braidlora_B")
_AXES = {"A": 0, "B": 1}  # along which the experts are stacked
# What the two halves and the router are called as parameters of a layer with a pair.
_PARAMETERS = {
    "mixer.weight": "braidlora_router.weight",
    **{f"{own}_{f}.weight": f"braidlora_{f}.parametrizations.weight.original{i}"
       for i, own in enumerate(("lora", "rest")) for f in _AXES},
}  # fmt: skip


class _Stack(nn.Module):
    """A weight made of two parameters, so that one of them can be frozen."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, own: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([own, rest], self.axis)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        own, rest = weight.chunk(2, self.axis)
        return own.contiguous(), rest.contiguous()


def pair_config(**settings: Any) -> MultiLoraConfig:
    """The PEFT configuration of a pair; its rank is set later."""
    return MultiLoraConfig(share="none", num_experts=2, **settings)


def divide(model: nn.Module, adapter: str) -> None:
    """Make the two experts of an adapter, in all its layers, separate parameters."""
    for module in list(model.modules()):
        if isinstance(module, MultiLoraLayer) and module.has_adapter(adapter):
            A, _, B = module.linears(adapter)
            parametrize.register_parametrization(A, "weight", _Stack(_AXES["A"]))
            parametrize.register_parametrization(B, "weight", _Stack(_AXES["B"]))


def tensor_name(parameter: str) -> str:
    """The name of a pair's tensor, by that of a divided layer's parameter without the adapter's name."""
    for name, own in _PARAMETERS.items():
        if parameter.endswith(own):
            return parameter.removesuffix(own) + name
    return parameter


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pair's tensors as the state dict of a multi-LoRA; other tensors unchanged."""
    result = dict(tensors)
    for layer in layers_of(tensors, ("mixer",)):
        result[join(layer, "braidlora_router")] = result.pop(join(layer, "mixer"))
        for factor, axis in _AXES.items():
            own, rest = (result.pop(join(layer, f"{one}_{factor}")) for one in ("lora", "rest"))
            result[join(layer, f"braidlora_{factor}")] = torch.cat([own, rest], axis).contiguous()
    return result
