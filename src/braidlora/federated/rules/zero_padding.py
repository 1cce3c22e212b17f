"""ZeroPadding: factors of different ranks, padded with zeros and averaged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from braidlora.federated._update import ClientUpdate
from braidlora.federated.checks import rank_axis
from braidlora.federated.factors import AdaptedLayer, factor_shapes, split
from braidlora.federated.mean import accumulation_dtype, moved, owned
from braidlora.federated.rules._base import Rule, Shapes


class ZeroPadding(Rule):
    """A and B padded to the largest rank and averaged each on its own (HetLoRA's baseline, arXiv 2401.06432).

    A client sends its own rank, is sent the largest, and keeps its first r_i rows of A and columns of B. Biased as
    FedIT is, and besides the padding pulls the higher ranks towards zero.
    """

    name = "zero-padding"
    uploads = ("lora_A", "lora_B")
    downloads = ("lora_A", "lora_B")
    keeps = ("lora_A", "lora_B")
    ranks = "any"
    exact = False
    accepts_robust = False

    def _begin(self) -> None:
        self._mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        share = weight / (self._weight + weight)
        for name, tensor in update.tensors.items():
            value = tensor.detach().to(accumulation_dtype(tensor))
            axis = rank_axis(split(name)[1])
            mean = self._mean.get(name)
            if mean is None:
                self._mean[name] = owned(value)
                continue
            if axis is not None:
                rank = max(mean.shape[axis], value.shape[axis])
                mean, value = _padded(mean, axis, rank), _padded(value, axis, rank)
            self._mean[name] = moved(mean, value, share)

    def _result(self) -> dict[str, Tensor]:
        # The rank of the shared state stays, whoever took part.
        result = {}
        for name, mean in self._mean.items():
            axis, before = rank_axis(split(name)[1]), (self._shared or {}).get(name)
            if axis is not None and before is not None:
                mean = _padded(mean, axis, max(mean.shape[axis], before.shape[axis]))
            result[name] = mean
        self._mean = {}
        return result

    def received(self, payload: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """The first `rank` rows of A and columns of B; zeros follow where the payload has fewer."""
        cut = {}
        for name, tensor in payload.items():
            axis = rank_axis(split(name)[1])
            cut[name] = tensor if axis is None else owned(_padded(tensor, axis, rank).narrow(axis, 0, rank))
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
