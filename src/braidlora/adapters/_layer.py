"""`MultiLoraLayer`: a linear layer of any kind with multi-LoRA adapters around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from braidlora.adapters._balance import Attachment, BalanceScope
from braidlora.adapters._config import InitWeights, MultiLoraConfig
from braidlora.adapters._fused import Expand, Gate, Shrink, padding_for, without_autocast
from braidlora.adapters._merging import DENSE, MergeableLayer
from braidlora.adapters._mixed_batch import mixed_batch_forward
from braidlora.adapters._parts import AdapterParts
from braidlora.adapters._torch_state import fresh_in_forward, is_alone, is_observed, is_transformed
from braidlora.adapters.functional import gate_weights, mix, stacked_ranks
from braidlora.errors import MergeError

_MERGE_ALTERNATIVES = (
    "Its expert weights depend on the token, so no single weight matrix equals it. Alternatives: keep the adapter "
    "(`PeftModel.from_pretrained` loads it on the base model); or fix the expert weights, e.g. to their mean on one "
    "task, with `braidlora export`, which writes a plain LoRA that PEFT can merge and reports what the "
    "approximation costs. A trainer that merges in order to generate, as TRL's GRPO with use_vllm=True does, works "
    "with use_vllm=False, or with num_experts=1."
)


class MultiLoraLayer(AdapterParts, MergeableLayer, nn.Module, BaseTunerLayer):
    """A frozen linear layer with N LoRA experts that share a factor, weighted per token by a router.

        y = W0 x + s·B Σᵢ wᵢ(x) Aᵢ x  (share="B", ALoRA),   w(x) = softmax(W_g x / τ),   s = alpha / r

    and the other members of the family in `functional`. Source: arXiv 2509.25414, section 3.

    Per adapter name there are three `nn.Linear` without bias, in float32 under a 16-bit base unless told otherwise:

        share    braidlora_A.weight   braidlora_router.weight   braidlora_B.weight
        "B"      (N·r, k)             (N, k)                    (d, r)
        "A"      (r, k)               (N, k)                    (d, N·r)
        "none"   (N·r, k)             (N, k)                    (d, N·r)

    Expert i owns rows, or columns, i·r … (i+1)·r − 1. With N = 1 there is no router and the layer is LoRA.

    Args:
        base_layer: any module that maps (…, k) to (…, d) linearly: nn.Linear, GPT-2's Conv1D, quantised layers.
        adapter_name: name of the first adapter.
        config: its configuration.
        r, lora_alpha: its rank and alpha, after `rank_pattern` and `alpha_pattern`.
    """

    adapter_layer_names = ("braidlora_A", "braidlora_router", "braidlora_B")
    other_param_names = (
        "r", "lora_alpha", "use_rslora", "scaling", "lora_dropout", "dropout_mask", "gate", "fused",
    )  # fmt: skip
    blocks = 1  # how many linear layers side by side this is; more in `MultiLoraParameter`
    in_features: int
    out_features: int

    if TYPE_CHECKING:  # inherited from PEFT, which mypy does not follow
        base_layer: nn.Module
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        set_adapter: Callable[..., None]
        _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MultiLoraConfig, r: int, lora_alpha: float
    ) -> None:
        super().__init__()
        self._wrap(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.dropout_mask: dict[str, str] = {}
        self.gate: dict[str, Gate] = {}
        self.fused: dict[str, bool] = {}
        self.balance = BalanceScope()
        self.braidlora_A = nn.ModuleDict()
        self.braidlora_router = nn.ModuleDict()
        self.braidlora_B = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def _wrap(self, base_layer: nn.Module) -> None:
        """Keep the base layer, and set its width on either side."""
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: MultiLoraConfig, r: int, lora_alpha: float) -> None:
        """Add the adapter `adapter_name`, or draw it anew with nothing left of the one before."""
        self.forget_adapter(adapter_name)
        self.configure(adapter_name, config, r, lora_alpha)
        rows_A, columns_B = stacked_ranks(config.share, config.num_experts, r)
        k, d, blocks = self.in_features, self.out_features, self.blocks
        self.braidlora_A[adapter_name] = nn.Linear(k, blocks * rows_A, bias=False)
        if config.num_experts > 1:
            self.braidlora_router[adapter_name] = nn.Linear(k, blocks * config.num_experts, bias=False)
        self.braidlora_B[adapter_name] = nn.Linear(blocks * columns_B, d, bias=False)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def configure(self, adapter_name: str, config: MultiLoraConfig, r: int, lora_alpha: float) -> None:
        """Take an adapter's settings over, apart from its weights."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = self.configured_scaling(adapter_name)
        self.lora_dropout[adapter_name] = config.lora_dropout
        self.dropout_mask[adapter_name] = config.dropout_mask
        self.fused[adapter_name] = config.fused
        self.gate[adapter_name] = Gate(
            config.share, config.num_experts, r, config.router_temperature, config.balance_loss
        )

    def reset_parameters(self, adapter_name: str, init_weights: InitWeights = True) -> None:
        """Draw every A_i and the router Kaiming-uniform(a = √5); B is zero, or drawn too without `init_weights`.

        "gaussian" draws every A_i from N(0, 1/r²) instead, as PEFT's LoRA does.
        """
        # Bound and deviation do not depend on the rows, so one draw of the stack is N independent draws of its blocks.
        A, router, B = self._linears(adapter_name)
        if init_weights == "gaussian":
            nn.init.normal_(A.weight, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        if router is not None:
            nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(B.weight)
        else:
            nn.init.kaiming_uniform_(B.weight, a=math.sqrt(5))

    def _linears(self, name: str) -> tuple[nn.Linear, nn.Linear | None, nn.Linear]:
        """A, router (None for N = 1) and B of an adapter."""
        router = self.braidlora_router[name] if self.gate[name].num_experts > 1 else None
        return cast(
            tuple[nn.Linear, nn.Linear | None, nn.Linear],
            (self.braidlora_A[name], router, self.braidlora_B[name]),
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, k) → (…, d); with `adapter_names`, one for every entry of the first axis, see `_mixed_batch`."""
        row_names = kwargs.pop("adapter_names", None)
        if row_names is not None:
            return mixed_batch_forward(self, self.braidlora_A, x, row_names, args, kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.braidlora_A]
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
            self.fused[name]
            and all(linear is None or is_plain(linear, x) for linear in self._linears(name))
            and (self._dropout(name) == 0.0 or self.dropout_mask[name] == "shared")
            for name in names
        )

    def _forward_fused(self, x: Tensor, names: list[str], args: Any, kwargs: Any) -> Tensor:
        own, keeps_x = owns_its_result(self.base_layer), keeps_its_input(self.base_layer)
        # A base layer that may change its input comes first, so that base and adapter read the same x.
        y = None if keeps_x else self.base_layer(x, *args, **kwargs)
        x_cast = autocast_input(x)
        fork = keeps_x and x_cast is x and x.requires_grad and torch.is_grad_enabled()
        zs = []
        with without_autocast(x):
            for name in names:
                A, router, _ = self._linears(name)
                W = None if router is None else router.weight
                padding = padding_for(self.gate[name], A.out_features)
                result = Shrink.apply(x_cast, A.weight, W, self._dropout(name), padding, fork, own)
                if fork:
                    z, x_cast = result
                else:
                    z = result
                zs.append(z)
        if y is None:
            y = self.base_layer(x_cast if fork else x, *args, **kwargs)
        with without_autocast(x):
            for name, z in zip(names, zs, strict=True):
                gate, B, balance = self.gate[name], self._linears(name)[2], None
                if gate.balance and self.training and gate.num_experts > 1:
                    balance = Attachment(self.balance, gate.balance, x.shape[:-1])
                elif gate.balance:
                    gate = gate._replace(balance=0.0)
                in_place = own and not is_observed() and is_alone(y, fresh_in_forward())
                y = Expand.apply(y, z, B.weight, self.scaling[name], gate, in_place, balance)
        return y

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """The adapter's share of y (…, d) in plain operations: compiled, sharded, or with a mask per expert."""
        gate = self.gate[name]
        _, router, B = self._linears(name)
        h = self._shrink(x, name)
        if router is not None:
            w = gate_weights(linear_in_dtype_of(router, x), gate.temperature)
            if gate.balance and self.training:
                w = self.balance.attach(w.flatten(0, -2), gate.balance, x.shape[:-1]).view_as(w)
            h = mix(h, w, gate.share).to(h.dtype)
        return linear_in_dtype_of(B, h) * self.scaling[name]

    def _shrink(self, x: Tensor, name: str) -> Tensor:
        """x Aᵀ (…, N·r), or (…, r) where A is shared, with x dropped as the adapter asks."""
        A, dropout, gate = self._linears(name)[0], self._dropout(name), self.gate[name]
        if dropout == 0.0:
            return linear_in_dtype_of(A, x)
        if self.dropout_mask[name] == "shared" or gate.share == "A":
            return linear_in_dtype_of(A, F.dropout(x, dropout))
        # One mask per A: every expert keeps its own r columns of a shrink with its own mask.
        blocks = [slice(i * gate.r, (i + 1) * gate.r) for i in range(gate.num_experts)]
        if is_plain(A, x):
            weight = A.weight.to(x.dtype)
            return torch.cat([F.linear(F.dropout(x, dropout), weight[block]) for block in blocks], -1)
        return torch.cat([linear_in_dtype_of(A, F.dropout(x, dropout))[..., block] for block in blocks], -1)

    def _dropout(self, name: str) -> float:
        return self.lora_dropout[name] if self.training else 0.0

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·B A in the base weight's layout: (d, k), or (k, d) for Conv1D. Only for N = 1.

        Raises:
            MergeError: the adapter has a router.
        """
        self._check_mergeable(adapter)
        A, _, B = self._linears(adapter)
        delta = (B.weight @ A.weight) * self.scaling[adapter]
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def _check_mergeable(self, name: str) -> None:
        gate = self.gate[name]
        if gate.num_experts > 1:
            raise MergeError(
                f"adapter {name!r} has num_experts={gate.num_experts} and cannot be merged. {_MERGE_ALTERNATIVES}"
            )
        super()._check_mergeable(name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a LoRA: a token-routed one has no weight update to factorise."""
        return adapter_name in self.gate and self.gate[adapter_name].num_experts == 1

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: share={gate.share}, num_experts={gate.num_experts}, r={gate.r}"
            for name, gate in self.gate.items()
        )


def can_fuse(x: Tensor) -> bool:
    """Whether an input may go through `Shrink` and `Expand`: a plain tensor in plain eager mode.

    Under compilation, tracing and function transforms the plain operations are what can be compiled, saved and
    transformed.
    """
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_floating_point()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_transformed()
    )


def autocast_input(x: Tensor) -> Tensor:
    """x as autocast would have it: the base layer casts x on its own, and the adapter has a cast of its own.

    The meta device, on which shapes alone are worked out, knows no autocast.
    """
    device_type = x.device.type
    if device_type == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def is_plain(linear: nn.Linear, x: Tensor) -> bool:
    """Whether `linear.weight` may be read directly: no wrapper, parametrisation or hook owns it, and it is here.

    FSDP, offloading and torch.nn.utils.parametrize replace the module, its class or its forward; the weight they
    leave outside a call is a shard or a placeholder.
    """
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and not linear._forward_pre_hooks
        and not linear._forward_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        and type(linear.weight) in (nn.Parameter, Tensor)
        and linear.weight.device == x.device
    )


def keeps_its_input(base_layer: nn.Module) -> bool:
    """Whether the base layer leaves x as it is, and no hook of its own could do otherwise or see a gradient of x."""
    return (
        (type(base_layer) in DENSE or type(base_layer).__module__ == "bitsandbytes.nn.modules")
        and "forward" not in base_layer.__dict__
        and not base_layer._forward_pre_hooks
        and not base_layer._forward_hooks
        and not base_layer._backward_hooks
        and not base_layer._backward_pre_hooks
        and not is_observed()
    )


def owns_its_result(base_layer: nn.Module) -> bool:
    """Whether the base layer's result, and the gradient it returns for x, are fresh, as a dense product's are.

    They are written over only where, besides, nobody else holds them (`is_alone`).
    """
    return type(base_layer) in DENSE and keeps_its_input(base_layer)


def linear_in_dtype_of(linear: nn.Linear, x: Tensor) -> Tensor:
    """x Wᵀ in the dtype of x. The weight is cast where it may be read, and else x, so that wrappers see a call."""
    if is_plain(linear, x):
        return F.linear(x, linear.weight.to(x.dtype))
    return linear(x.to(linear.weight.dtype)).to(x.dtype)
