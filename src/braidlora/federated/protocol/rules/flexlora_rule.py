"""How FlexLoRA sums and cuts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.errors import ConfigError, FederationError
from braidlora.federated.protocol.change import Change, Product
from braidlora.federated.protocol.factors import join, layers_of, split
from braidlora.federated.protocol.low_rank import with_orthonormal_rows
from braidlora.federated.protocol.rules.flora_rule import ProductRule, scaled_products
from braidlora.federated.protocol.rules.spec import RuleSpec
from braidlora.federated.protocol.update import ClientUpdate


class FlexLoRA(ProductRule):
    """W = Σ pᵢ sᵢ Bᵢ Aᵢ = U S Vᵀ; client i gets B = U S[:rᵢ] / sᵢ and A = Vᵀ[:rᵢ] (Bai et al., arXiv 2402.11505).

    Exact up to the cut, which is the best approximation of that rank. The server keeps A = Vᵀ and B = U S (scaling 1).
    Memory grows with the clients' ranks until they sum to min(d, k) / 2; beyond that W is dense.

    Args:
        max_rank: how many ranks of W are kept: the largest rank of any client of the federation. By default all, up to
            min(d, k).
        also_share: as for every rule.
    """

    dense_above = 0.5  # beyond half of min(d, k) the QR of the stacks costs more than W itself
    forgets = (
        "replaces the shared update with theirs and loses everything beyond their ranks; flora and fed-alora-het add "
        "updates up instead"
    )

    def __init__(self, spec: RuleSpec, *, max_rank: int | None = None, **settings: Any) -> None:
        if max_rank is not None and max_rank < 1:
            raise ConfigError(f"flexlora: max_rank is {max_rank}; it must be 1 or more")
        super().__init__(spec, **settings)
        self.max_rank = max_rank
        self._scalings: dict[int, set[float]] = {}

    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        super()._accumulate(update, weight)
        for layer in layers_of(update.tensors, ["lora_A"]):
            rank = update.tensors[join(layer, "lora_A")].shape[0]
            self._scalings.setdefault(rank, set()).add(float(update.scaling))

    @torch.no_grad()
    def _result(self) -> dict[str, Tensor]:
        result = self._extra.finish()
        for layer in sorted(self._sums):
            U, S, Vh = self._sums.pop(layer).svd()
            # In the next round a client of a higher rank than any that took part is sent W at its own rank.
            rank = len(S) if self.max_rank is None else self.max_rank
            B = (U[:, :rank] * (S[:rank] / self._weight)).contiguous()
            result[join(layer, "lora_A")] = with_orthonormal_rows(Vh, rank).contiguous()
            result[join(layer, "lora_B")] = F.pad(B, (0, rank - B.shape[1]))
        return result

    def change(self, update: ClientUpdate, before: Mapping[str, Tensor]) -> Change:
        """sᵢ (Bᵢ Aᵢ − B A) of every layer, with the B and A that the client was sent."""
        yield from self._heads_change(update.tensors, before)
        for layer, (B, A) in scaled_products(update):
            names = join(layer, "lora_B"), join(layer, "lora_A")
            if not before.keys() >= set(names):  # the first round, from B = 0 and the client's own A
                yield layer, Product(B, A)
                continue
            sent = self.payload_for({name: before[name] for name in names}, A.shape[0], update.scaling)
            B0, A0 = sent[names[0]].to(B.dtype) * update.scaling, sent[names[1]].to(A.dtype)
            # B A − B0 A0 = (B − B0) A + B0 (A − A0): no difference of two large products.
            yield layer, Product(torch.cat([B - B0, B0], 1), torch.cat([A, A - A0], 0))

    def moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Change:
        """The difference of the two W."""
        yield from self._heads_change(after, before)
        for layer in layers_of(after, ["lora_A"]):
            names = join(layer, "lora_B"), join(layer, "lora_A")
            B, A = (after[name].double() for name in names)
            if before.keys() >= set(names):
                B0, A0 = (before[name].double() for name in names)
                B, A = torch.cat([B, -B0], 1), torch.cat([A, A0], 0)
            yield layer, Product(B, A)

    def payload_for(
        self, shared: Mapping[str, Tensor], rank: int, scaling: float | None = None, round: int = 0
    ) -> dict[str, Tensor]:
        """B = U S[:rank] / scaling and A = Vᵀ[:rank].

        Args:
            scaling: the client's; by default the one that clients of this rank had in the updates seen so far, or that
                all clients had if none had this rank, or 1 before any update.

        Raises:
            FederationError: no scaling was given, and clients of this rank had several.
        """
        scaling = self._scaling(rank) if scaling is None else scaling
        payload = {}
        for name, tensor in super().payload_for(shared, rank).items():
            factor = split(name)[1]
            if factor == "lora_A":
                tensor = with_orthonormal_rows(tensor, rank).contiguous()
            elif factor == "lora_B":
                tensor = F.pad(tensor, (0, max(0, rank - tensor.shape[1])))[:, :rank] / scaling
            payload[name] = tensor
        return payload

    def _scaling(self, rank: int) -> float:
        seen = self._scalings.get(rank) or set().union(*self._scalings.values())
        if len(seen) > 1:
            raise FederationError(
                f"clients had the scalings {', '.join(f'{s:g}' for s in sorted(seen))}; give the one of the client "
                f"of rank {rank}: payload_for(shared, {rank}, scaling=…)"
            )
        return next(iter(seen), 1.0)
