"""How raFLoRA weights each rank by the clients that have it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.errors import ConfigError
from braidlora.federated.protocol.factors import join, layers_of, split
from braidlora.federated.protocol.low_rank import ProductSum, with_orthonormal_rows
from braidlora.federated.protocol.rules.flexlora_rule import FlexLoRA
from braidlora.federated.protocol.rules.spec import RuleSpec
from braidlora.federated.protocol.update import ClientUpdate


class RaFLoRA(FlexLoRA):
    """W = Σ_h Σ_{rᵢ ≥ h} (nᵢ / N_h) sᵢ Bᵢ[:, l:h] Aᵢ[l:h] over rank levels l < h (Wu et al., arXiv 2602.13486).

    N_h counts the rows of the participants of rank h or more only, so the higher ranks are not weighted down by clients
    that do not have them. W = U S Vᵀ is split evenly, B = U √S and A = √S Vᵀ, cut to each client's rank as in FlexLoRA;
    with equal ranks W is FlexLoRA's. It is not Σ pᵢ ΔWᵢ, on purpose.

    The publication leaves three cases open. The scalings are part of the sum, as in FlexLoRA. A level that no
    participant has keeps its directions of the round before. And where W has fewer directions than a client has ranks,
    A gets further orthonormal rows: zeros in both factors would never be trained.

    Args:
        levels: the ranks of all clients of the federation. By default every rank is a level of its own, which gives the
            same W and takes more memory.
        max_rank, also_share: as in FlexLoRA.
    """

    forgets = ""

    def __init__(self, spec: RuleSpec, *, levels: Collection[int] | None = None, **settings: Any) -> None:
        if levels is not None and (not levels or min(levels) < 1):
            raise ConfigError(f"raflora: levels is {levels!r}; expected the clients' ranks, each 1 or more")
        super().__init__(spec, **settings)
        self._levels = None if levels is None else sorted({0, *levels})

    def _begin(self) -> None:
        super()._begin()
        self._by_level: dict[str, dict[tuple[int, int], ProductSum]] = {}  # by layer and (l, h)
        self._having: dict[str, dict[tuple[int, int], float]] = {}  # the weight of the clients behind each

    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        for layer in layers_of(update.tensors, ["lora_A"]):
            B, A = update.tensors[join(layer, "lora_B")], update.tensors[join(layer, "lora_A")]
            self._scalings.setdefault(A.shape[0], set()).add(float(update.scaling))
            sums, having = self._by_level.setdefault(layer, {}), self._having.setdefault(layer, {})
            for level in self._slices(A.shape[0]):
                low, high = level
                if level not in sums:
                    sums[level] = ProductSum(self.dense_above if self._levels else math.inf)
                sums[level].add(B[:, low:high], A[low:high], weight * update.scaling)
                having[level] = having.get(level, 0.0) + weight
        self._extra.add({n: t for n, t in update.tensors.items() if n in self.also_share}, weight)

    def _slices(self, rank: int) -> Iterator[tuple[int, int]]:
        """The (l, h) of a client of this rank."""
        if self._levels is None:
            return pairwise(range(rank + 1))
        return pairwise([level for level in self._levels if level < rank] + [rank])

    @torch.no_grad()
    def _result(self) -> dict[str, Tensor]:
        result = self._extra.finish()
        for layer in sorted(self._by_level):
            sums, having = self._by_level.pop(layer), self._having.pop(layer)
            whole = ProductSum(self.dense_above)
            for level, one in sorted(sums.items()):
                whole.add(*one.factors(1.0 / having[level]), 1.0)
            seen = max(high for _, high in sums)
            if (before := self._before(layer)) is not None and before[1].shape[0] > seen:
                B, A = before
                whole.add(B[:, seen:], A[seen:], 1.0)
            U, S, Vh = whole.svd()
            rank = len(S) if self.max_rank is None else self.max_rank
            result[join(layer, "lora_B")], result[join(layer, "lora_A")] = _evenly(U, S, Vh, rank)
        return result

    def _before(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """(B, A) of the shared state; None in the first round, when B is zero."""
        names, shared = (join(layer, "lora_B"), join(layer, "lora_A")), self._shared or {}
        if not shared.keys() >= set(names) or not shared[names[0]].any():
            return None
        return shared[names[0]], shared[names[1]]

    def payload_for(
        self, shared: Mapping[str, Tensor], rank: int, scaling: float | None = None, round: int = 0
    ) -> dict[str, Tensor]:
        """B = (U √S)[:rank] / scaling and A = (√S Vᵀ)[:rank]; arguments and errors as in FlexLoRA."""
        payload = super().payload_for(shared, rank, scaling, round)
        for name in payload:
            if split(name)[1] == "lora_A":
                payload[name] = _extended(shared[name], rank)
        return payload


def _evenly(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U √S (d, rank) and A = √S Vᵀ (rank, k); rows of A without a singular value are orthonormal, with B zero."""
    noise = S[:1] * torch.finfo(S.dtype).eps * max(U.shape[0], Vh.shape[1])
    root = torch.where(noise < S, S, 0.0).sqrt()[:rank]
    rows = with_orthonormal_rows(Vh, rank)
    scales = torch.where(root > 0.0, root, 1.0)
    A = rows * F.pad(scales, (0, rank - len(scales)), value=1.0)[:, None]
    B = F.pad(U[:, :rank] * root, (0, rank - len(root)))
    return B.contiguous(), A.contiguous()


def _extended(A: Tensor, rank: int) -> Tensor:
    """The first `rank` rows of A, whose rows are orthogonal; if it has fewer, then further orthonormal ones."""
    if rank <= A.shape[0]:
        return A[:rank].clone()
    lengths = A.norm(dim=1, keepdim=True)
    unit = A / torch.where(lengths > 0.0, lengths, 1.0)
    return torch.cat([A, with_orthonormal_rows(unit, rank)[A.shape[0] :]], 0).contiguous()
