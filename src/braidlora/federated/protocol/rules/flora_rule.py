"""Rules that sum products, and how FLoRA stacks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from braidlora.federated.protocol.change import Change, Product
from braidlora.federated.protocol.factors import AdaptedLayer, join, layers_of
from braidlora.federated.protocol.low_rank import ProductSum
from braidlora.federated.protocol.mean import WeightedMean, accumulation_dtype
from braidlora.federated.protocol.rules.rule import Part, Rule, Shapes
from braidlora.federated.protocol.update import ClientUpdate


class ProductRule(Rule):
    """Sums the products Σ wᵢ sᵢ Bᵢ Aᵢ of each layer, as stacks up to `dense_above` · min(d, k) ranks."""

    dense_above: float

    def _begin(self) -> None:
        self._sums: dict[str, ProductSum] = {}
        self._extra = WeightedMean()
        self._extra.start({})

    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        for layer in layers_of(update.tensors, ["lora_A"]):
            B, A = update.tensors[join(layer, "lora_B")], update.tensors[join(layer, "lora_A")]
            self._sums.setdefault(layer, ProductSum(self.dense_above)).add(B, A, weight * update.scaling)
        self._extra.add({n: t for n, t in update.tensors.items() if n in self.also_share}, weight)


class FLoRA(ProductRule):
    """ΔW = Σ pᵢ sᵢ Bᵢ Aᵢ as one stack B = [pᵢ sᵢ Bᵢ], A = [Aᵢ] of rank Σ rᵢ (Wang et al., arXiv 2409.05976).

    The stack includes the scalings, so its own scaling is 1. Clients add it to the frozen stack that they carry, and
    restart their own adapters; the base weights are never edited. The server keeps the last round's stack as `lora_A`,
    `lora_B` (what `payload_for` sends) and all earlier rounds as `carried_A`, `carried_B`; `catch_up` sends both as
    one stack, to a client that missed a round or is new.

    Memory grows with the clients' ranks up to min(d, k); beyond that a dense sum, equally exact, takes the stack's
    place, and never more than min(d, k) ranks travel or are kept.
    """

    dense_above = 1.0

    def _result(self) -> dict[str, Tensor]:
        result = self._extra.finish()
        for layer in sorted(self._sums):
            # Popped, so that only one layer's factors are held twice.
            B, A = self._sums.pop(layer).factors(1.0 / self._weight)
            result[join(layer, "lora_B")], result[join(layer, "lora_A")] = B, A
        for layer, (B, A) in _history(self._shared or {}).items():
            if not B.any():  # the start, with B = 0, rather than a round
                continue
            result[join(layer, "carried_B")], result[join(layer, "carried_A")] = B, A
        return result

    def change(self, update: ClientUpdate, before: Mapping[str, Tensor]) -> Change:
        """sᵢ Bᵢ Aᵢ of every layer: a client's own adapter starts at zero in every round."""
        yield from self._heads_change(update.tensors, before)
        yield from scaled_products(update)

    def moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Change:
        """The round's stack."""
        yield from self._heads_change(after, before)
        for layer in layers_of(after, ["lora_A"]):
            yield layer, Product(after[join(layer, "lora_B")], after[join(layer, "lora_A")])

    def received(
        self,
        payload: Mapping[str, Tensor],
        rank: int,
        own: Mapping[str, Tensor] | None = None,
        *,
        full: bool = False,
        part: Part | None = None,
    ) -> dict[str, Tensor]:
        """The stack that the client carries from now on: the payload's, added to its own unless that is `full`."""
        received = {name: tensor for name, tensor in payload.items() if name in self.also_share}
        carried = {} if full or own is None else own
        for layer in layers_of(payload, ["lora_A"]):
            B, A = _with_stack(carried, payload, layer)
            received[join(layer, "carried_B")], received[join(layer, "carried_A")] = B, A
        return received

    def catch_up(
        self, shared: Mapping[str, Tensor], rank: int, scaling: float | None = None
    ) -> dict[str, Tensor]:
        """All rounds so far as one stack, which replaces the one that the client carries."""
        payload = {name: tensor.clone() for name, tensor in shared.items() if name in self.also_share}
        for layer, (B, A) in _history(shared).items():
            payload[join(layer, "lora_B")], payload[join(layer, "lora_A")] = B.clone(), A.clone()
        return payload

    def download_shapes(
        self, layers: Iterable[AdaptedLayer], rank: int, ranks: Iterable[int], round: int = 0
    ) -> Shapes:
        """The stack of all clients that took part: Σ rᵢ, and at most min(d, k) where the sum became dense."""
        total = sum(ranks)
        shapes: Shapes = {}
        for layer in layers:
            stacked = min(total, layer.out_features, layer.in_features)
            shapes |= self._shapes([layer], self.spec.downloads, stacked)
        return shapes


def scaled_products(update: ClientUpdate) -> Iterator[tuple[str, Product]]:
    """sᵢ Bᵢ Aᵢ by layer."""
    for layer in layers_of(update.tensors, ["lora_A"]):
        B, A = (update.tensors[join(layer, factor)].detach() for factor in ("lora_B", "lora_A"))
        yield layer, Product(B.to(accumulation_dtype(B)) * update.scaling, A.to(accumulation_dtype(A)))


@torch.no_grad()
def _history(shared: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """All rounds' stacks as one (B, A) per layer."""
    return {layer: _with_stack(shared, shared, layer) for layer in layers_of(shared, ["lora_A"])}


def _with_stack(
    carried: Mapping[str, Tensor], stack: Mapping[str, Tensor], layer: str
) -> tuple[Tensor, Tensor]:
    """(B, A) of a layer's carried stack, if any, followed by a round's; of at most min(d, k) ranks."""
    products = ProductSum(dense_above=1.0)
    if join(layer, "carried_B") in carried:
        products.add(carried[join(layer, "carried_B")], carried[join(layer, "carried_A")], 1.0)
    products.add(stack[join(layer, "lora_B")], stack[join(layer, "lora_A")], 1.0)
    return products.factors()
