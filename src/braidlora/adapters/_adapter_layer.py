"""`AdapterLayer`: what the multi-LoRA and the factored layer have in common, the fused forward above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from braidlora.adapters._fused import without_autocast
from braidlora.adapters._fusion import (
    autocast_input,
    can_fuse,
    is_one_position,
    keeps_its_input,
    owns_its_result,
    readable_weight,
)
from braidlora.adapters._merging import MergeableLayer
from braidlora.adapters._mixed_batch import mixed_batch_forward
from braidlora.adapters._no_grad import (
    Factors,
    Kept,
    Source,
    add_product,
    add_step,
    input_of_many,
    input_of_step,
)
from braidlora.adapters._peft_compat import BaseTunerLayer, _get_in_out_features
from braidlora.adapters._torch_state import fresh_in_forward, is_alone, is_autocasting
from braidlora.adapters.sharing import lora_scaling
from braidlora.errors import ConfigError

Weights = tuple[Any, ...]  # those of `linears`: a Tensor each, or None for a router that there is not


class AdapterLayer(MergeableLayer, nn.Module, BaseTunerLayer):
    """A frozen linear layer with adapters around it, each a shrink to a few columns and an expand back.

        x (…, k) ─► shrink ─► z (T, few) ─► expand ─► · s + W0 x

    A subclass names its factors in `adapter_layer_names` (the first is A) and its settings in `other_param_names`, and
    defines `_make_factors`, `reset_parameters`, `linears`, `_shrink`, `_expand`, `_multipliers`, `_mixed`, `_delta` and
    `plain_lora`.

    Args:
        base_layer: any module that maps (…, k) to (…, d) linearly: nn.Linear, GPT-2's Conv1D, quantized layers.
        adapter_name: name of the first adapter.
        config: its configuration.
        r, lora_alpha: its rank and alpha, after `rank_pattern` and `alpha_pattern`.
    """

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...]
    # `peft.helpers.disable_input_dtype_casting` switches this; our layers cast their weights, and x only for wrappers.
    cast_input_dtype_enabled = True
    in_features: int
    out_features: int

    if TYPE_CHECKING:  # inherited from PEFT, which mypy does not follow
        base_layer: nn.Module
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int, lora_alpha: float
    ) -> None:
        super().__init__()
        self._kept = Kept()
        self._wrap(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.fused: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter_name
        self._add_factors()
        self.update_layer(adapter_name, config, r, lora_alpha)

    def _wrap(self, base_layer: nn.Module) -> None:
        """Keep the base layer, and set the widths of its input and output."""
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def _add_factors(self) -> None:
        """Add the dictionaries, by adapter name, of the factors and of the subclass's own settings."""
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def update_layer(self, adapter_name: str, config: Any, r: int, lora_alpha: float) -> None:
        """Add the adapter `adapter_name`, or replace it by a new one with nothing left of the old."""
        self.forget_adapter(adapter_name)
        self.configure(adapter_name, config, r, lora_alpha)
        self._make_factors(adapter_name, config, r)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _make_factors(self, adapter_name: str, config: Any, r: int) -> None:
        """Add the adapter's matrices, with any values."""
        raise NotImplementedError

    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw the adapter's matrices as its configuration says."""
        raise NotImplementedError

    def linears(self, adapter_name: str) -> tuple[nn.Linear | None, ...]:
        """The adapter's matrices, in the order of `factor_names`."""
        raise NotImplementedError

    def factor(self, factor: str, adapter_name: str) -> nn.Linear:
        """One of the adapter's matrices, by the attribute that holds it: `getattr(self, factor)[adapter_name]`."""
        modules: Any = self._modules  # every forward asks for all of them, and attributes of modules are slow
        linear: nn.Linear = modules[factor]._modules[adapter_name]
        return linear

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The attributes that hold the adapter's matrices, frozen ones included."""
        return self.adapter_layer_names

    def configure(self, adapter_name: str, config: Any, r: int, lora_alpha: float) -> None:
        """Take over an adapter's settings, but not its weights."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = self.configured_scaling(adapter_name)
        self.lora_dropout[adapter_name] = config.lora_dropout
        self.fused[adapter_name] = config.fused

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the adapter has weights in this layer."""
        return adapter_name in self.scaling

    def first_factor(self, adapter_name: str) -> nn.Module:
        """The module of the adapter's A, a new one for a new adapter of an old name."""
        factor: nn.Module = getattr(self, self.adapter_layer_names[0])[adapter_name]
        return factor

    def forget_adapter(self, adapter_name: str) -> None:
        """Remove every module and setting of the adapter; the active adapters do not change."""
        self._kept.drop(adapter_name)
        for name in self.adapter_layer_names + self.other_param_names:
            entries = getattr(self, name)
            if adapter_name in entries:
                del entries[adapter_name]

    # ---- what is kept between forwards without gradients: see `_no_grad`

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Make adapters active, see PEFT."""
        self._kept.clear()
        super().set_adapter(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, see PEFT."""
        self._kept.drop(adapter_name)
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation mode."""
        self._kept.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept.clear()  # .to, .half, .cuda, …
        return super()._apply(*args, **kwargs)

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, k) → (…, d); with `adapter_names`, one for every entry of the first axis, see `_mixed_batch`."""
        if kwargs and (row_names := kwargs.pop("adapter_names", None)) is not None:
            return mixed_batch_forward(self, x, row_names, args, kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.scaling]
        if self._disable_adapters or self.merged_adapters or not names:
            return self.base_layer(x, *args, **kwargs)
        if not (self.training or torch.is_grad_enabled()) and can_fuse(x):
            return self._forward_without_gradients(x, names, args, kwargs)
        if (weights := self._readable_weights(x, names)) is not None:
            return self._forward_fused(x, weights, args, kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = y + self._delta(x, name).to(y.dtype)
        return y

    def _fuses(self, name: str) -> bool:
        """Whether an adapter's settings let it be computed from its weights, without calling its modules."""
        return self.fused[name]

    def _readable_weights(self, x: Tensor, names: list[str]) -> dict[str, Weights] | None:
        """The adapters' weights, if the autograd functions apply: in plain eager mode, with weights to be read."""
        if not can_fuse(x):
            return None
        found = {}
        for name in names:
            weights = self._weights(name, x) if self._fuses(name) else None
            if weights is None:
                return None
            found[name] = weights
        return found

    def _weights(self, name: str, x: Tensor) -> Weights | None:
        """The weights of `linears`, or None if one of them may not be read directly."""
        weights: list[Tensor | None] = []
        device = x.device
        for linear in self.linears(name):
            if linear is None:
                weights.append(None)
            elif (weight := readable_weight(linear, device)) is not None:
                weights.append(weight)
            else:
                return None
        return tuple(weights)

    def _forward_without_gradients(self, x: Tensor, names: list[str], args: Any, kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if is_one_position(x):
            for name in names:
                y = self._add_step(y, x, name)
            return y
        own = owns_its_result(self.base_layer) and keeps_its_input(self.base_layer)
        for name in names:
            in_place = own and is_alone(y, fresh_in_forward())
            y = self._add_update(y, x, name, in_place)
        return y

    def update_without_gradients(self, x: Tensor, name: str) -> Tensor:
        """The adapter's update (…, d), in evaluation mode with gradients off."""
        y = x.new_zeros(*x.shape[:-1], self.out_features)
        return self._add_step(y, x, name) if is_one_position(x) else self._add_update(y, x, name, True)

    def _add_step(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        """y plus the adapter's update of one position, (B, 1, d)."""
        if is_autocasting():
            x = autocast_input(x)
            with without_autocast(x):
                return self._add_step_in_dtype_of_x(y, x, name)
        return self._add_step_in_dtype_of_x(y, x, name)

    def _add_step_in_dtype_of_x(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        x_B1K, scaling = input_of_step(x), self.scaling[name]
        factors = self._kept.find(name, x_B1K, scaling) if self.fused[name] else None
        if factors is None:
            factors = self._factors(name, x_B1K)
            if factors is None:
                return y + self._delta(x, name).to(y.dtype)
            factors = factors.scaled(scaling, x_B1K)
            self._kept.put(name, factors, self._sources(name), x_B1K, scaling)
        return add_step(y, self._mixed(F.linear(x_B1K, factors.shrink_PK), factors, name), factors.expand_UD)

    def _add_update(self, y: Tensor, x: Tensor, name: str, in_place: bool) -> Tensor:
        """y plus the update of several positions; y is overwritten if `in_place`."""
        x = autocast_input(x)
        self._kept.drop(name)
        with without_autocast(x):
            x_T1K = input_of_many(x)
            factors = self._factors(name, x_T1K)
            if factors is not None:
                u_T1U = self._mixed(F.linear(x_T1K, factors.shrink_PK), factors, name)
                return add_product(y, u_T1U.squeeze(1), factors.expand_UD, self.scaling[name], in_place)
        return y + self._delta(x, name).to(y.dtype)

    def _factors(self, name: str, x: Tensor) -> Factors | None:
        """The adapter's matrices; None where it cannot be computed without calling its modules."""
        weights = self._weights(name, x) if self.fused[name] else None
        return None if weights is None else self._multipliers(name, weights, x)

    def _sources(self, name: str) -> list[Source]:
        holders = [cast(nn.ModuleDict, getattr(self, factor)) for factor in self.factor_names]
        return [Source(holder._modules, name) for holder in holders if name in holder]

    def _multipliers(self, name: str, weights: Weights, x: Tensor) -> Factors:
        """The adapter's matrices for an input like x."""
        raise NotImplementedError

    def _mixed(self, z_T1P: Tensor, factors: Factors, name: str) -> Tensor:
        """u (T, 1, U) from z (T, 1, P), without gradients."""
        return z_T1P

    def _forward_fused(self, x: Tensor, weights: dict[str, Weights], args: Any, kwargs: Any) -> Tensor:
        self._kept.clear()
        base_layer, x_cast = self.base_layer, autocast_input(x)
        if len(weights) == 1 and x_cast is x and not (args or kwargs):
            y = self._forward_in_one(x, base_layer, weights)
            if y is not None:
                return y
        keeps_x = keeps_its_input(base_layer)
        # A base layer that may change its input runs first, so that base and adapter read the same x.
        y = None
        if not keeps_x:
            y = base_layer(x, *args, **kwargs)
            x_cast = autocast_input(x)
        own = keeps_x and owns_its_result(base_layer)
        fork = keeps_x and x_cast is x and x.requires_grad and torch.is_grad_enabled()
        zs = []
        with without_autocast(x):
            for name in weights:
                z, x_cast = self._shrink(x_cast, name, weights[name], fork, own)
                zs.append(z)
        if y is None:
            y = base_layer(x_cast if fork else x, *args, **kwargs)
        with without_autocast(x):
            for name, z in zip(weights, zs, strict=True):
                # A base layer that keeps its input is not observed, see there.
                in_place = own and is_alone(y, fresh_in_forward())
                y = self._expand(y, z, name, weights[name], in_place, x.shape)
        return y

    def _forward_in_one(self, x: Tensor, base_layer: nn.Module, weights: dict[str, Weights]) -> Tensor | None:
        """The forward of one adapter as one autograd function, if there is one for this base layer."""
        return None

    def _shrink(self, x: Tensor, name: str, weights: Weights, fork: bool, own: bool) -> tuple[Tensor, Tensor]:
        """z (T, few) by `Shrink`, and the x for whatever reads it next: the one handed on, with `fork`."""
        raise NotImplementedError

    def _expand(
        self, y: Tensor, z: Tensor, name: str, weights: Weights, in_place: bool, shape: torch.Size
    ) -> Tensor:
        """y (…, d) plus the adapter's update, by `Expand`; `shape` is that of x."""
        raise NotImplementedError

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """The adapter's update (…, d) in plain operations."""
        raise NotImplementedError

    def _dropout(self, name: str) -> float:
        return self.lora_dropout[name] if self.training else 0.0

    # ---- as one matrix

    def plain_lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (r, k) and B (d, r) of the plain LoRA that equals this adapter at its scaling s."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·B A in the base weight's layout: (d, k), or (k, d) for Conv1D.

        Raises:
            MergeError: the adapter is not one matrix.
        """
        A, B = self.plain_lora(adapter)
        delta = (B @ A) * self.scaling[adapter]
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    # ---- scaling, as PEFT's LoraLayer offers it

    def configured_scaling(self, name: str) -> float:
        """The scaling s of the adapter's configuration."""
        return lora_scaling(self.lora_alpha[name], self.r[name], self.use_rslora[name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale an adapter to `scale` times its configured scaling; does nothing if it is not in this layer."""
        if adapter in self.scaling:
            self._set_scaling(adapter, scale * self.configured_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self._set_scaling(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or reset it to the configured one."""
        for name in self.active_adapters:
            if name in self.scaling:
                self._set_scaling(
                    name, self.configured_scaling(name) if scale is None else self.scaling[name] / scale
                )

    def _set_scaling(self, adapter_name: str, scaling: float) -> None:
        if adapter_name in self.merged_adapters and scaling != self.scaling[adapter_name]:
            raise ConfigError(
                f"adapter {adapter_name!r} is merged into the base weights: a new scaling would have no effect now and "
                "would be subtracted at unmerge; call unmerge_adapter first"
            )
        self.scaling[adapter_name] = scaling
