"""How ZeroPadding pads and averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.errors import ConfigError
from braidlora.federated.protocol.checks import rank_axis
from braidlora.federated.protocol.factors import AdaptedLayer, split
from braidlora.federated.protocol.mean import accumulation_dtype, moved, owned
from braidlora.federated.protocol.rules.rule import Part, Rule, Shapes
from braidlora.federated.protocol.rules.spec import RuleSpec
from braidlora.federated.protocol.update import ClientUpdate

Padding = Literal["zeros", "by-rank"]


class ZeroPadding(Rule):
    """A and B, each padded to the largest rank and averaged by itself (HetLoRA's baseline, arXiv 2401.06432).

    A client sends its own rank, is sent the largest, and keeps its first r_i rows of A and columns of B. As biased as
    FedIT, and the padding pulls the higher ranks toward zero: a round without any client of the largest rank sets them
    to zero in both A and B, where neither gets a gradient again.

    Args:
        padding: "zeros", as published; "by-rank" averages each rank over the clients that have it, and does not change
            a rank that no participating client has (until one has had it, each client keeps its own start).
        also_share: as for every rule.
    """

    def __init__(self, spec: RuleSpec, *, padding: Padding = "zeros", **settings: Any) -> None:
        if padding not in ("zeros", "by-rank"):
            raise ConfigError(f"padding is {padding!r}; it must be 'zeros' or 'by-rank'")
        super().__init__(spec, **settings)
        self.padding = padding
        if padding == "zeros":
            self.forgets = (
                "permanently sets the ranks above the participating ones to zero; "
                "federation.padding=by-rank keeps them"
            )

    def _begin(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._having: dict[str, list[float]] = {}  # by name and rank, the weight of the clients that have it

    @torch.no_grad()
    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        share = weight / (self._weight + weight)
        for name, tensor in update.tensors.items():
            value = tensor.detach().to(accumulation_dtype(tensor))
            axis = rank_axis(split(name)[1])
            mean = self._mean.get(name)
            if axis is not None and self.padding == "by-rank":
                self._mean[name] = self._moved_by_rank(name, mean, value, axis, weight)
                continue
            if mean is None:
                self._mean[name] = owned(value)
                continue
            if axis is not None:
                rank = max(mean.shape[axis], value.shape[axis])
                mean, value = _padded(mean, axis, rank), _padded(value, axis, rank)
            self._mean[name] = moved(mean, value, share)

    def _moved_by_rank(
        self, name: str, mean: Tensor | None, value: Tensor, axis: int, weight: float
    ) -> Tensor:
        """The mean after `value` moved its first ranks, each by its share of the weight of the clients that have it."""
        rank, having = value.shape[axis], self._having.setdefault(name, [])
        having += [0.0] * (rank - len(having))
        shares = [weight / (having[i] + weight) for i in range(rank)]
        self._having[name] = [w + weight if i < rank else w for i, w in enumerate(having)]
        if mean is None:
            return owned(value)
        dtype = torch.promote_types(mean.dtype, value.dtype)
        mean = owned(_padded(mean, axis, rank).to(dtype))
        by_rank = torch.tensor(shares, dtype=dtype)
        mean.narrow(axis, 0, rank).lerp_(value.to(dtype), by_rank[:, None] if axis == 0 else by_rank)
        return mean

    def _result(self) -> dict[str, Tensor]:
        # The shared state keeps its rank, whichever clients took part.
        result = {}
        for name, mean in self._mean.items():
            axis, before = rank_axis(split(name)[1]), (self._shared or {}).get(name)
            if axis is not None and before is not None and before.shape[axis] > mean.shape[axis]:
                if self.padding == "by-rank":
                    rest = before.narrow(axis, mean.shape[axis], before.shape[axis] - mean.shape[axis])
                    mean = torch.cat([mean, rest.to(mean.dtype)], axis)
                else:
                    mean = _padded(mean, axis, before.shape[axis])
            result[name] = mean
        self._mean, self._having = {}, {}
        return result

    def received(
        self,
        payload: Mapping[str, Tensor],
        rank: int,
        own: Mapping[str, Tensor] | None = None,
        *,
        full: bool = False,
        part: Part | None = None,
    ) -> dict[str, Tensor]:
        """The first `rank` rows of A and columns of B; where the payload has fewer, then zeros, or `own` by rank."""
        cut = {}
        for name, tensor in payload.items():
            axis = rank_axis(split(name)[1])
            if axis is None:
                cut[name] = tensor
                continue
            missing = rank - tensor.shape[axis]
            if missing > 0 and self.padding == "by-rank" and own is not None and name in own:
                rest = own[name].narrow(axis, tensor.shape[axis], missing).to(tensor.dtype)
                tensor = torch.cat([tensor, rest], axis)
            cut[name] = owned(_padded(tensor, axis, rank).narrow(axis, 0, rank))
        return cut

    def download_shapes(
        self, layers: Iterable[AdaptedLayer], rank: int, ranks: Iterable[int], round: int = 0
    ) -> Shapes:
        """The largest rank."""
        return self._shapes(layers, self.spec.downloads, max([rank, *ranks]))


def _padded(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """The tensor with zeros up to `rank` rows or columns; itself where it has that many."""
    missing = rank - tensor.shape[axis]
    return F.pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing)) if missing > 0 else tensor
