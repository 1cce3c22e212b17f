"""Adding adapters with a fixed weight update to the base weight, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from braidlora.errors import MergeError

DENSE = (nn.Linear, Conv1D)


class MergeableLayer:
    """`merge` and `unmerge` for a tuner layer with `get_delta_weight(name)`, exact up to the base weight's rounding."""

    if TYPE_CHECKING:  # the tuner layer's own and what PEFT gives it, which mypy does not follow
        adapter_layer_names: tuple[str, ...]
        merged_adapters: list[str]
        get_base_layer: Callable[[], nn.Module]
        get_delta_weight: Callable[[str], Tensor]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; `safe_merge` refuses a result that is not finite.

        Raises:
            MergeError: an adapter has no fixed update, or the base weight is quantised. Nothing is changed then.
        """
        own = getattr(self, self.adapter_layer_names[0])
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in own]
        for name in names:
            self._check_mergeable(name)
        weight = cast(Tensor, self._mergeable_weight())
        merged = weight.data
        for name in names:
            merged = merged + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                # PEFT's own wording, for code that matches on it.
                raise MergeError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: merged weights are "
                    "not finite; the base layer is unchanged"
                )
        weight.data = merged
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Subtract all merged adapters from the base weight."""
        weight = cast(Tensor, self._mergeable_weight())
        while self.merged_adapters:
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def _mergeable_weight(self) -> Tensor | None:
        """The tensor that an update is added to; None where the base layer has no dense one."""
        base_layer = self.get_base_layer()
        return cast(Tensor, base_layer.weight) if isinstance(base_layer, DENSE) else None

    def _check_mergeable(self, name: str) -> None:
        weight = self._mergeable_weight()
        if type(weight) not in (nn.Parameter, Tensor) or not cast(Tensor, weight).is_floating_point():
            base_layer = self.get_base_layer()
            raise MergeError(
                f"adapter {name!r} cannot be merged into a {type(base_layer).__name__}, whose weight is no dense "
                "floating-point matrix; load the base model unquantised and merge there"
            )
