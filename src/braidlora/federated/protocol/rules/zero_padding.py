"""ZeroPadding: factors of different ranks, padded with zeros and averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.errors import ConfigError
from braidlora.federated.protocol.checks import rank_axis
from braidlora.federated.protocol.factors import AdaptedLayer, factor_shapes, split
from braidlora.federated.protocol.mean import accumulation_dtype, moved, owned
from braidlora.federated.protocol.rules._base import Rule, Shapes
from braidlora.federated.protocol.update import ClientUpdate

Padding = Literal["zeros", "by-rank"]


class ZeroPadding(Rule):
    """A and B padded to the largest rank and averaged each on its own (HetLoRA's baseline, arXiv 2401.06432).

    A client sends its own rank, is sent the largest, and keeps its first r_i rows of A and columns of B. Biased as
    FedIT is, and besides the padding pulls the higher ranks towards zero: a round in which no client of the largest
    rank takes part sets them to zero in A and in B, and from there no gradient leads back.

    Args:
        padding: "zeros", as published; "by-rank" averages every rank over the clients that have it, and leaves a rank
            that no client has taken part with as it was (before any has, as each client started).
        also_share: as for every rule.
    """

    name = "zero-padding"
    uploads = ("lora_A", "lora_B")
    downloads = ("lora_A", "lora_B")
    keeps = ("lora_A", "lora_B")
    ranks = "any"
    exact = False
    accepts_robust = False

    def __init__(self, *, padding: Padding = "zeros", **settings: object) -> None:
        if padding not in ("zeros", "by-rank"):
            raise ConfigError(f"padding is {padding!r}; it must be 'zeros' or 'by-rank'")
        super().__init__(**settings)  # type: ignore[arg-type]
        self.padding = padding

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
        """The mean with `value` in its first ranks, each by its share of the weight of those that have the rank."""
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
        # The rank of the shared state stays, whoever took part.
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
        self, payload: Mapping[str, Tensor], rank: int, own: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The first `rank` rows of A and columns of B. Where the payload has fewer, zeros follow, or by rank `own`."""
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
        self, layers: Iterable[AdaptedLayer], rank: int, ranks: Iterable[int], r_intermediate: int = 16
    ) -> Shapes:
        """The largest rank."""
        return dict(factor_shapes(layers, self.downloads, max([rank, *ranks]), r_intermediate))


def _padded(tensor: Tensor, axis: int, rank: int) -> Tensor:
    """The tensor itself where it has `rank` rows, or columns, or more."""
    missing = rank - tensor.shape[axis]
    return F.pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing)) if missing > 0 else tensor
