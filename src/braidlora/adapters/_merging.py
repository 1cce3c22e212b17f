"""Merging adapters with a fixed weight update into the base weight, and unmerging them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from braidlora.adapters._peft_compat import check_adapters_to_merge, onload_layer
from braidlora.errors import MergeError

DENSE = (nn.Linear, Conv1D)


class MergeableLayer:
    """`merge` and `unmerge` for a tuner layer with `get_delta_weight(name)`, exact up to the base weight's rounding."""

    if TYPE_CHECKING:  # the layer's own, or inherited from PEFT, which mypy does not follow
        active_adapters: list[str]
        merged_adapters: list[str]
        has_adapter: Callable[[str], bool]
        get_base_layer: Callable[[], nn.Module]
        get_delta_weight: Callable[[str], Tensor]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; `safe_merge` rejects a result that is not finite.

        Raises:
            MergeError: an adapter has no fixed update, or the base weight is quantized. Nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        for name in names:
            self._check_mergeable(name)
        cast(Tensor, self._mergeable_weight()).data = self._merged_weight(names, safe_merge)
        self.merged_adapters += names

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` would raise; change nothing."""
        given = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in given if self.has_adapter(name) and name not in self.merged_adapters]
        for name in names:
            self._check_mergeable(name)
        if safe_merge:
            self._merged_weight(names, safe_merge)

    def _merged_weight(self, names: list[str], safe_merge: bool) -> Tensor:
        """The base weight with the adapters added; a new tensor unless there are none."""
        merged = cast(Tensor, self._mergeable_weight()).data
        for name in names:
            merged = merged + self.get_delta_weight(name).to(merged.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                # PEFT's wording, for code that matches it.
                raise MergeError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: merged weights are "
                    "not finite; the base layer is unchanged"
                )
        return merged

    def unmerge(self) -> None:
        """Subtract all merged adapters from the base weight."""
        weight = cast(Tensor, self._mergeable_weight())
        while self.merged_adapters:
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def _mergeable_weight(self) -> Tensor | None:
        """The tensor that an update is added to; None if the base layer has no dense weight."""
        base_layer = self.get_base_layer()
        return cast(Tensor, base_layer.weight) if isinstance(base_layer, DENSE) else None

    def _check_mergeable(self, name: str) -> None:
        weight = self._mergeable_weight()
        if type(weight) not in (nn.Parameter, Tensor) or not cast(Tensor, weight).is_floating_point():
            base_layer = self.get_base_layer()
            raise MergeError(
                f"adapter {name!r} cannot be merged into a {type(base_layer).__name__}, whose weight is not a "
                "dense floating-point matrix; load the base model unquantized and merge there"
            )


class MergeableTuner:
    """Merging in all layers or in none: a partly merged model would compute neither function."""

    if TYPE_CHECKING:
        model: nn.Module

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (the active ones by default) into the base weights, reversibly.

        Raises:
            MergeError: a layer cannot be merged. No layer is merged then.
        """
        self._check_layers(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)  # type: ignore[misc]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_layers(safe_merge, adapter_names)
        unloaded: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[misc]
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        return unloaded

    def _check_layers(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, MergeableLayer):
                with onload_layer(layer):
                    layer.check_merge(safe_merge, adapter_names)
