"""How Fed-ALoRA for clients of different ranks sums the products B2 B1 into a common base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from braidlora.errors import ConfigError
from braidlora.federated.protocol.change import Change
from braidlora.federated.protocol.factors import AdaptedLayer, join, layers_of, split
from braidlora.federated.protocol.mean import accumulation_dtype
from braidlora.federated.protocol.rules.rule import Rule, Shapes
from braidlora.federated.protocol.rules.spec import RuleSpec
from braidlora.federated.protocol.update import ClientUpdate

Wire = Literal["factors", "smallest"]
_FACTORS = ("factoredlora_B1", "factoredlora_B2")
_TRAVEL = (*_FACTORS, "factoredlora_product", "factoredlora_base")


class FedALoRAHet(Rule):
    """B_base ← B_base + Σ pᵢ B2ᵢ B1ᵢ (arXiv 2509.25414, heterogeneous ranks).

    Client i has ΔWᵢ = sᵢ (B_base + B2ᵢ B1ᵢ) Mᵢ Aᵢ, and keeps Aᵢ and Mᵢ. After the round B_base contains what B1 and B2
    learned, so they restart (B2 at zero), or the update would count twice.

    Args:
        wire: "factors" sends B1 and B2, r(d + m) numbers per layer; "smallest" sends their product, d·m numbers, in
            layers where that is smaller.
        also_share, aggregator: as for every rule; a robust aggregator works on the products.
    """

    def __init__(self, spec: RuleSpec, *, wire: Wire = "factors", **settings: Any) -> None:
        if wire not in spec.wires:
            raise ConfigError(f"wire is {wire!r}; it must be {' or '.join(map(repr, spec.wires))}")
        if wire == "smallest":
            spec = dataclasses.replace(spec, uploads=(*spec.uploads, "factoredlora_product"))
        super().__init__(spec, **settings)
        self.wire = wire

    def _reference(self) -> dict[str, Tensor]:
        # The products are changes already, so they are clipped and compared against zero.
        return {name: tensor for name, tensor in super()._reference().items() if name in self.also_share}

    def change(self, update: ClientUpdate, before: Mapping[str, Tensor]) -> Change:
        """B2 B1 of every layer, by which B_base moves."""
        yield from self._heads_change(update.tensors, before)
        yield from _products(update.tensors)

    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        heads = {name: t for name, t in update.tensors.items() if name in self.also_share}
        self._aggregator.add({**heads, **dict(_products(update.tensors))}, weight)

    def _result(self) -> dict[str, Tensor]:
        result = self._aggregator.finish()
        for name, base in (self._shared or {}).items():
            if name in result and name not in self.also_share:
                result[name] = base.to(accumulation_dtype(base)) + result[name]
        return result

    def _expectation(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
        # Stored as the shape of B_base, (d, m) per layer; what that requires of an update depends on its form.
        expected: dict[str, tuple[int | None, ...]] = {n: shapes[n] for n in shapes if n in self.also_share}
        for layer in layers_of(shapes, _TRAVEL):
            B1, B2 = (shapes.get(join(layer, factor), (0, 0)) for factor in _FACTORS)
            base = join(layer, "factoredlora_base")
            product = shapes.get(join(layer, "factoredlora_product"), shapes.get(base))
            expected[base] = (B2[0], B1[-1]) if product is None else product
        return expected

    def _forms(self) -> tuple[tuple[str, ...], ...]:
        return (_FACTORS, ("factoredlora_product",), ("factoredlora_base",))

    def _expected_of(self, update: ClientUpdate) -> dict[str, tuple[int | None, ...]]:
        expected: dict[str, tuple[int | None, ...]] = {}
        for name, shape in super()._expected_of(update).items():
            layer, factor = split(name)
            product = join(layer, "factoredlora_product")
            if factor != "factoredlora_base" or product in update.tensors:
                expected[name if name in self.also_share else product] = shape
            else:
                expected[join(layer, "factoredlora_B1")] = (None, shape[1])
                expected[join(layer, "factoredlora_B2")] = (shape[0], None)
        return expected

    @torch.no_grad()
    def outgoing(self, tensors: Mapping[str, Tensor], round: int = 0) -> dict[str, Tensor]:
        """B1 and B2; with `wire` "smallest" their product in layers where that is smaller."""
        sent = {n: t for n, t in tensors.items() if split(n)[1] in _FACTORS or n in self.also_share}
        if self.wire == "smallest":
            for layer in layers_of(sent, _TRAVEL):
                B1, B2 = (sent[join(layer, factor)] for factor in _FACTORS)
                if B1.numel() + B2.numel() > B2.shape[0] * B1.shape[1]:
                    sent[join(layer, "factoredlora_product")] = _product(sent, layer)
                    for factor in _FACTORS:
                        del sent[join(layer, factor)]
        return sent

    def upload_shapes(self, layers: Iterable[AdaptedLayer], rank: int, round: int = 0) -> Shapes:
        """As `outgoing` sends them."""
        shapes: Shapes = {}
        for layer in layers:
            d, m = layer.out_features, self.r_intermediate
            small = self.wire == "smallest" and rank * (d + m) > d * m
            shapes |= self._shapes([layer], ("factoredlora_product",) if small else _FACTORS, rank)
        return shapes


def _products(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What an update adds to B_base in every layer, by the name of B_base."""
    for layer in layers_of(tensors, _TRAVEL):
        product = tensors.get(join(layer, "factoredlora_product"))
        yield join(layer, "factoredlora_base"), _product(tensors, layer) if product is None else product


@torch.no_grad()
def _product(tensors: Mapping[str, Tensor], layer: str) -> Tensor:
    """B2 B1 (d, m) in float32 or better."""
    B1, B2 = (tensors[join(layer, factor)].detach() for factor in _FACTORS)
    dtype = torch.promote_types(accumulation_dtype(B2), accumulation_dtype(B1))
    return B2.to(dtype) @ B1.to(dtype)
