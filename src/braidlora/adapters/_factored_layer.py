"""`FactoredLoraLayer`: a linear layer of any kind with a factored LoRA around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.adapters._fused import Expand, Gate, Shrink, without_autocast
from braidlora.adapters._layer import (
    autocast_input,
    can_fuse,
    is_plain,
    keeps_its_input,
    linear_in_dtype_of,
    owns_its_result,
)
from braidlora.adapters._merging import MergeableLayer
from braidlora.adapters._mixed_batch import mixed_batch_forward
from braidlora.adapters._parts import AdapterParts
from braidlora.adapters._torch_state import fresh_in_forward, is_alone, is_observed


class Factors(NamedTuple):
    """An adapter's five matrices: A (r, k), M (m, r), B1 (r, m), B2 (d, r) and the frozen base (d, m)."""

    A: nn.Linear
    M: nn.Linear
    B1: nn.Linear
    B2: nn.Linear
    base: nn.Linear


class FactoredLoraLayer(AdapterParts, MergeableLayer, nn.Module, BaseTunerLayer):
    """A frozen linear layer with factored LoRAs.

        y = W0 x + s·(B_base + B2 B1) M A x,   s = alpha / r        (arXiv 2509.25414, heterogeneous ranks)

        x (…, k) ─► A (r, k) ─► M (m, r) ─┬───────────────► B_base (d, m), frozen ─┐
                                          └─► B1 (r, m) ──► B2 (d, r) ─────────────┴─► · s + W0 x

    No d × k matrix is formed, and x is read once; B_base and B2 are one matrix product.

    Args:
        base_layer: any module that maps (…, k) to (…, d) linearly: nn.Linear, GPT-2's Conv1D, quantised layers.
        adapter_name: name of the first adapter.
        config: its configuration.
        r, lora_alpha: its rank and alpha, after `rank_pattern` and `alpha_pattern`.
    """

    adapter_layer_names = ("factoredlora_A", "factoredlora_M", "factoredlora_B1", "factoredlora_B2")
    # The base is not among the above, which PEFT makes trainable whenever it sets an adapter active.
    other_param_names = (
        "factoredlora_base", "r", "r_intermediate", "lora_alpha", "use_rslora", "scaling", "lora_dropout", "fused",
    )  # fmt: skip

    if TYPE_CHECKING:  # inherited from PEFT, which mypy does not follow
        base_layer: nn.Module
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        set_adapter: Callable[..., None]
        _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: FactoredLoraConfig, r: int, lora_alpha: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.r: dict[str, int] = {}
        self.r_intermediate: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.fused: dict[str, bool] = {}
        for name in (*self.adapter_layer_names, "factoredlora_base"):
            setattr(self, name, nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def update_layer(self, adapter_name: str, config: FactoredLoraConfig, r: int, lora_alpha: float) -> None:
        """Add the adapter `adapter_name`, or draw it anew with nothing left of the one before."""
        self.forget_adapter(adapter_name)
        self.configure(adapter_name, config, r, lora_alpha)
        m, k, d = config.r_intermediate, self.in_features, self.out_features
        for factor, (inside, outside) in {
            "A": (k, r), "M": (r, m), "B1": (m, r), "B2": (r, d), "base": (m, d),
        }.items():  # fmt: skip
            getattr(self, f"factoredlora_{factor}")[adapter_name] = nn.Linear(inside, outside, bias=False)
        self.factors(adapter_name).base.requires_grad_(False)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def configure(self, adapter_name: str, config: FactoredLoraConfig, r: int, lora_alpha: float) -> None:
        """Take an adapter's settings over, apart from its weights."""
        self.r[adapter_name] = r
        self.r_intermediate[adapter_name] = config.r_intermediate
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = self.configured_scaling(adapter_name)
        self.lora_dropout[adapter_name] = config.lora_dropout
        self.fused[adapter_name] = config.fused

    def reset_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draw A, M and B1 Kaiming-uniform(a = √5); B2 and the base are zero, or drawn too without `init_weights`."""
        A, M, B1, B2, base = self.factors(adapter_name)
        for linear in (A, M, B1) if init_weights else (A, M, B1, B2, base):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(B2.weight)
            nn.init.zeros_(base.weight)

    def factors(self, adapter_name: str) -> Factors:
        """The adapter's matrices as modules."""
        return Factors(*(getattr(self, f"factoredlora_{f}")[adapter_name] for f in Factors._fields))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, k) → (…, d); with `adapter_names`, one for every entry of the first axis, see `_mixed_batch`."""
        own = cast(nn.ModuleDict, self.factoredlora_A)
        row_names = kwargs.pop("adapter_names", None)
        if row_names is not None:
            return mixed_batch_forward(self, own, x, row_names, args, kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in own]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self._can_fuse(x, names):
            return self._forward_fused(x, names, args, kwargs)
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = y + self._delta(x, name).to(y.dtype)
        return y

    def _can_fuse(self, x: Tensor, names: list[str]) -> bool:
        """Whether the two autograd functions apply: plain eager mode, and weights that may be read directly."""
        return can_fuse(x) and all(
            self.fused[name] and all(is_plain(linear, x) for linear in self.factors(name)) for name in names
        )

    def _forward_fused(self, x: Tensor, names: list[str], args: Any, kwargs: Any) -> Tensor:
        own, keeps_x = owns_its_result(self.base_layer), keeps_its_input(self.base_layer)
        # A base layer that may change its input comes first, so that base and adapter read the same x.
        y = None if keeps_x else self.base_layer(x, *args, **kwargs)
        x_cast = autocast_input(x)
        fork = keeps_x and x_cast is x and x.requires_grad and torch.is_grad_enabled()
        shrunk = []
        with without_autocast(x):
            for name in names:
                result = Shrink.apply(
                    x_cast, self.factors(name).A.weight, None, self._dropout(name), 0, fork, own
                )
                if fork:
                    h, x_cast = result
                else:
                    h = result
                shrunk.append(self._between(h, name))
        if y is None:
            y = self.base_layer(x_cast if fork else x, *args, **kwargs)
        with without_autocast(x):
            for name, v in zip(names, shrunk, strict=True):
                # A gate of one expert adds s · v [B_base | B2]ᵀ.
                gate = Gate("B", 1, v.shape[-1], 1.0, 0.0)
                in_place = own and not is_observed() and is_alone(y, fresh_in_forward())
                y = Expand.apply(y, v, self._wide(name), self.scaling[name], gate, in_place)
        return y

    def _between(self, h: Tensor, name: str) -> Tensor:
        """[g | B1 g] (T, m + r) with g = M h, from h = A x (T, r)."""
        _, M, B1, _, _ = self.factors(name)
        g = linear_in_dtype_of(M, h)
        return torch.cat([g, linear_in_dtype_of(B1, g)], -1)

    def _wide(self, name: str) -> Tensor:
        """[B_base | B2] (d, m + r)."""
        _, _, _, B2, base = self.factors(name)
        return torch.cat([base.weight, B2.weight], 1)

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of y (…, d) in plain operations: compiled or sharded."""
        A, M, B1, B2, base = self.factors(name)
        dropout = self._dropout(name)
        g = linear_in_dtype_of(M, linear_in_dtype_of(A, F.dropout(x, dropout) if dropout else x))
        own = linear_in_dtype_of(B2, linear_in_dtype_of(B1, g))
        return (linear_in_dtype_of(base, g) + own) * self.scaling[name]

    def _dropout(self, name: str) -> float:
        return self.lora_dropout[name] if self.training else 0.0

    def plain_lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A' (m, k) and B' (d, m) of the plain LoRA of rank m that equals this adapter at its scaling s."""
        return to_plain_lora(*(linear.weight.detach() for linear in self.factors(adapter_name)))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·(B_base + B2 B1) M A in the base weight's layout: (d, k), or (k, d) for Conv1D."""
        A, B = self.plain_lora(adapter)
        delta = (B @ A) * self.scaling[adapter]
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may decompose the update into a LoRA. `factored_to_lora` gives one without a decomposition."""
        return adapter_name in self.r

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: r={r}, r_intermediate={self.r_intermediate[name]}" for name, r in self.r.items()
        )


def to_plain_lora(A: Tensor, M: Tensor, B1: Tensor, B2: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """A' = M A (m, k) and B' = B_base + B2 B1 (d, m): the plain LoRA of rank m with the same scaling.

    Args:
        A: (r, k). M: (m, r). B1: (r, m). B2: (d, r). base: (d, m).
    """
    return M @ A, base + B2 @ B1
