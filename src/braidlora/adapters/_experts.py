"""Adapters on the stacked experts of mixture-of-experts bases: Mixtral, Qwen3-MoE, gpt-oss and their like.

transformers stores the experts' matrices as parameters with three axes, in one module that reads them:

    x ──► gate_up_proj[e] ──► gate ──► down_proj[e] ──► · routing weight, summed over the token's experts

A parametrization ΔW[e], as in PEFT's LoRA, cannot express weights that depend on the token. So the module's forward is
computed here, adapters included, for every module that follows transformers' experts interface: its attributes give
the layout (transposed, biases, a gate or none), and `_apply_gate` is the model's own.

Each matrix of each expert is a separate linear layer with its own A's, router and B: a neuron of one expert is
unrelated to the same neuron of another, so they could share nothing.

Suffixes: T tokens, S = T·top_k rows (a token once for each of its experts) sorted by expert, E experts of the base,
N experts of the adapter, K in_features, D out_features, G rows of one stacked A, U columns of one stacked B.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braidlora.adapters import functional
from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters._fusion import is_plain
from braidlora.adapters._layer import MultiLoraLayer

# These, and `_grouped_mm` below, were checked against transformers 5.10 to 5.23.
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "config")
_GROUPED = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNED = 8  # grouped products want rows of a multiple of 16 bytes


def stacked_parameters(module: nn.Module) -> tuple[str, ...]:
    """The parameters of an experts module that can be adapted, in the order of their use; () for other modules."""
    # An instance with its own forward computes something else, unless it is accelerate's, which only moves inputs.
    own_forward = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    if own_forward or any(not hasattr(module, name) for name in _INTERFACE):
        return ()
    module = cast(Any, module)
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    parameters: list[Any] = [getattr(module, name, None) for name in names]
    if not all(
        type(parameter) is nn.Parameter and parameter.dim() == 3 and parameter.dtype.is_floating_point
        for parameter in parameters
    ):
        return ()
    return names if all(len(parameter) == module.num_experts for parameter in parameters) else ()


class Rows:
    """Rows (S, …) sorted by expert, and the product of each with its expert's matrix.

    Args:
        expert_S: the expert of every row, ascending.
        token_S: the token of every row.
        num_experts: E.
        implementation: transformers' `experts_implementation`: "eager" loops over the experts, "batched_mm" gathers a
            matrix for every row, all others multiply group by group.
    """

    def __init__(
        self, expert_S: Tensor, token_S: Tensor, num_experts: int, implementation: str | None
    ) -> None:
        self.expert_S, self.token_S, self.num_experts = expert_S, token_S, num_experts
        self.implementation = implementation or "eager"

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The number of rows of each expert."""
        return torch.bincount(self.expert_S, minlength=self.num_experts).tolist()

    def linear(
        self, x_SK: Tensor, weight: Tensor, bias_ED: Tensor | None = None, transposed: bool = False
    ) -> Tensor:
        """(S, D): W[e] x + b[e] of every row, with weight (E, D, K), or (E, K, D) if `transposed`."""
        if self.implementation == "batched_mm":
            y_SD = self._gathered(x_SK, weight, transposed)
        elif self.implementation != "eager" and x_SK.dtype in _GROUPED:
            y_SD = self._grouped(x_SK, weight if transposed else weight.transpose(1, 2))
        else:
            return self._looped(x_SK, weight, bias_ED, transposed)
        return y_SD if bias_ED is None else y_SD + bias_ED[self.expert_S]

    def _looped(self, x_SK: Tensor, weight: Tensor, bias_ED: Tensor | None, transposed: bool) -> Tensor:
        results = []
        # Not indexed: the gradient of an index would be as large as the stack.
        for e, (x, matrix) in enumerate(zip(x_SK.split(self.sizes), weight.unbind(0), strict=True)):
            if len(x):
                y = x @ matrix if transposed else F.linear(x, matrix)
                results.append(y if bias_ED is None else y + bias_ED[e])
        return torch.cat(results) if results else x_SK.new_zeros(0, weight.shape[2 if transposed else 1])

    def _gathered(self, x_SK: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        weight, x_SK = weight[self.expert_S], x_SK.to(weight.dtype)
        if transposed:
            return torch.bmm(x_SK.unsqueeze(1), weight).squeeze(1)
        return torch.bmm(weight, x_SK.unsqueeze(2)).squeeze(2)

    def _grouped(self, x_SK: Tensor, weight_EKD: Tensor) -> Tensor:
        from transformers.integrations.moe import _grouped_mm

        K, D = weight_EKD.shape[1:]
        more_K, more_D = -K % _ALIGNED, -D % _ALIGNED
        if more_K or more_D:
            weight_EKD = F.pad(weight_EKD, (0, more_D, 0, more_K))
            x_SK = F.pad(x_SK, (0, more_K))
        elif weight_EKD.stride(0) < K * D:  # blocks of columns, which interleave in memory
            weight_EKD = weight_EKD.contiguous()
        # As in transformers: not every device can count integers.
        ids = self.expert_S.float() if x_SK.device.type in ("cpu", "mps") else self.expert_S.int()
        sizes = torch.histc(ids, bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = torch.cumsum(sizes, 0, dtype=torch.int32)
        y_SD: Tensor = _grouped_mm(x_SK, weight_EKD, ends)
        return y_SD[:, :D] if more_D else y_SD


class MultiLoraParameter(MultiLoraLayer):
    """Multi-LoRA adapters of one stacked parameter: E linear layers k → d, one per expert of the base.

    The tensors are those of E `MultiLoraLayer`, stacked: A and router by rows, B by columns, expert e first.

        share    braidlora_A.weight   braidlora_router.weight   braidlora_B.weight
        "B"      (E·N·r, k)           (E·N, k)                  (d, E·r)
        "A"      (E·r, k)             (E·N, k)                  (d, E·N·r)
        "none"   (E·N·r, k)           (E·N, k)                  (d, E·N·r)

    A router per expert costs 1/r of the A's. A router for all experts would read down_proj's input, whose coordinates
    have a different meaning in every expert.

    Args:
        experts: the module that owns the parameter. It is not registered as a submodule here.
        parameter: the parameter's name.
        adapter_name, config, r, lora_alpha: as for `MultiLoraLayer`.
    """

    def __init__(
        self,
        experts: nn.Module,
        parameter: str,
        adapter_name: str,
        config: MultiLoraConfig,
        r: int,
        lora_alpha: float,
    ) -> None:
        self.parameter_name = parameter
        super().__init__(experts, adapter_name, config, r, lora_alpha)

    def _wrap(self, base_layer: nn.Module) -> None:
        # A plain reference: as a submodule, the experts' weights would have two names.
        self.__dict__["base_layer"] = base_layer
        self.blocks, *shape = self.weight.shape
        self.out_features, self.in_features = reversed(shape) if self.is_transposed else shape

    @property
    def weight(self) -> Tensor:
        """The parameter as the base stores it, (E, d, k) or (E, k, d)."""
        return cast(Tensor, getattr(self.get_base_layer(), self.parameter_name))

    @property
    def bias(self) -> None:
        """None: `bias` in the configuration trains biases of linear layers, and PEFT saves no others."""
        return None

    @property
    def is_transposed(self) -> bool:
        """Whether the base stores (E, k, d)."""
        return bool(cast(Any, self.get_base_layer()).is_transposed)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    def acts(self) -> bool:
        """Whether a forward adds anything."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return not (self.disable_adapters or self.merged) and any(
            name in self.braidlora_A for name in self.active_adapters
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(S, k) → (S, d): the update of the active adapters, without the base's result.

        Called with (x, rows). It is zero in a batch of mixed adapters, which cannot include any of this module.
        """
        names = [name for name in self.active_adapters if name in self.braidlora_A]
        if not self.acts() or kwargs.get("adapter_names") is not None:
            return x.new_zeros(len(x), self.out_features)
        return functools.reduce(torch.add, (self._delta_of_rows(x, name, args[0]) for name in names))

    def _delta_of_rows(self, x_SK: Tensor, name: str, rows: Rows) -> Tensor:
        gate, B = self.gate[name], self.linears(name)[2]
        h_SG = self._shrink_rows(x_SK, name, rows)
        if gate.num_experts > 1:
            w_SN = self.routing(x_SK, rows, name)
            if gate.balance and self.training:
                w_SN = self._with_balance_loss(w_SN, gate.balance, rows)
            h_SG = functional.mix(h_SG, w_SN, gate.share).to(h_SG.dtype)
        return self._by_columns(B, h_SG, rows) * self.scaling[name]

    def _with_balance_loss(self, w_SN: Tensor, coefficient: float, rows: Rows) -> Tensor:
        """Each expert's balance loss, weighted by its share of the rows: in total the weight of one linear layer's."""
        total = max(len(w_SN), 1)
        # Rows have their own order: no shape is given, so no mask can seem to fit.
        return torch.cat(
            [
                self.balance.attach(w, coefficient * len(w) / total, ()) if len(w) else w
                for w in w_SN.split(rows.sizes)
            ]
        )

    def routing(self, x_SK: Tensor, rows: Rows, name: str) -> Tensor:
        """Router weights (S, N) of an adapter with a router."""
        logits_SN = self._by_rows(cast(nn.Linear, self.linears(name)[1]), x_SK, rows)
        return functional.gate_weights(logits_SN, self.gate[name].temperature)

    def _shrink_rows(self, x_SK: Tensor, name: str, rows: Rows) -> Tensor:
        """x A[e]ᵀ (S, G). Rows get separate dropout masks, as in separate linear layers."""
        A, dropout, gate = self.linears(name)[0], self._dropout(name), self.gate[name]
        if dropout == 0.0:
            return self._by_rows(A, x_SK, rows)
        if self.has_one_mask(name):
            return self._by_rows(A, F.dropout(x_SK, dropout), rows)
        blocks = [
            self._by_rows(A, F.dropout(x_SK, dropout), rows)[:, i * gate.r : (i + 1) * gate.r]
            for i in range(gate.num_experts)
        ]
        return torch.cat(blocks, -1)

    def _by_rows(self, linear: nn.Linear, x_SK: Tensor, rows: Rows) -> Tensor:
        """x W[e]ᵀ for a matrix with one block of rows per expert."""
        if is_plain(linear, x_SK):
            weight = linear.weight.to(x_SK.dtype)
            return rows.linear(x_SK, weight.view(self.blocks, -1, weight.shape[1]))
        # A wrapper (FSDP, offloading) must see a call: all blocks are computed and one is kept.
        every = linear(x_SK.to(linear.weight.dtype)).to(x_SK.dtype).unflatten(-1, (self.blocks, -1))
        return every[torch.arange(len(x_SK), device=x_SK.device), rows.expert_S]

    def _by_columns(self, linear: nn.Linear, u_SU: Tensor, rows: Rows) -> Tensor:
        """u W[e]ᵀ for a matrix with one block of columns per expert."""
        if is_plain(linear, u_SU):
            weight = linear.weight.to(u_SU.dtype)
            return rows.linear(u_SU, weight.view(weight.shape[0], self.blocks, -1).transpose(0, 1))
        every = u_SU.new_zeros(len(u_SU), self.blocks, u_SU.shape[-1])
        every[torch.arange(len(u_SU), device=u_SU.device), rows.expert_S] = u_SU
        return linear(every.flatten(1).to(linear.weight.dtype)).to(u_SU.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·B[e] A[e] in the parameter's layout. Only for N = 1: raises MergeError if the adapter has a router."""
        self._check_mergeable(adapter)
        A, _, B = self.linears(adapter)
        A_ERK = A.weight.view(self.blocks, -1, self.in_features)
        B_EDR = B.weight.view(self.out_features, self.blocks, -1).transpose(0, 1)
        delta_EDK = torch.bmm(B_EDR, A_ERK) * self.scaling[adapter]
        return delta_EDK.transpose(1, 2) if self.is_transposed else delta_EDK

    def _mergeable_weight(self) -> Tensor | None:
        return self.weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: PEFT's conversion knows linear layers only. `multi_to_lora` converts it where that is exact."""
        return False

    def extra_repr(self) -> str:
        return f"{self.parameter_name}, {self.blocks} experts; {super().extra_repr()}"


class MultiLoraExperts(nn.Module):
    """An experts module with adapters on its parameters: a `MultiLoraParameter` under the name of each.

    Args:
        experts: a module that has `stacked_parameters`.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts
        self._up, self._down = stacked_parameters(experts)
        # Models call their experts with positional arguments, or with different names.
        self._arguments = tuple(inspect.signature(type(experts).forward).parameters)[1:4]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # hooks and the like are this module's own
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def adapted(self) -> dict[str, MultiLoraParameter]:
        """The adapters by parameter name."""
        return {name: part for name, part in self.named_children() if isinstance(part, MultiLoraParameter)}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states (T, k), experts of every token (T, top_k) and their routing weights (T, top_k) → (T, k)."""
        acting = {name: part for name, part in self.adapted().items() if part.acts()}
        if not acting:
            return self.base_layer(*args, **kwargs)
        base = cast(Any, self.base_layer)
        if getattr(base, "_is_expert_parallel", False):  # newer than the rest of the interface
            raise NotImplementedError(
                "the experts are spread over devices (expert parallelism), which adapters on them do not support; load "
                "the base model without it, or leave target_parameters out"
            )
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        x_TK, expert_Tk, weight_Tk = (given[name] for name in self._arguments)
        if getattr(base, self._up).device != x_TK.device:
            raise NotImplementedError(
                f"the experts' weights are on {getattr(base, self._up).device} and their input on {x_TK.device}: "
                "adapters on offloaded experts are not supported; load the base model without offloading"
            )
        implementation = base.config._experts_implementation
        expert_S, order_S = torch.sort(expert_Tk.flatten(), stable=True)
        token_S = order_S // expert_Tk.shape[-1]
        rows = Rows(expert_S, token_S, base.num_experts, implementation)
        z_SD = self._project(self._up, acting.get(self._up), x_TK[token_S], rows)
        z_SD = base._apply_gate(z_SD) if base.has_gate else base.act_fn(z_SD)
        y_SK = self._project(self._down, acting.get(self._down), z_SD, rows)
        if getattr(base, "has_post_expert_norm", False):
            y_SK = base.post_expert_norm(y_SK)
        y_SK = y_SK * weight_Tk.flatten()[order_S].unsqueeze(-1)
        if rows.implementation == "eager":
            return torch.zeros_like(x_TK).index_add_(0, token_S, y_SK.to(x_TK.dtype))
        # Sum in the order of a token's experts, without atomic additions, as transformers does.
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return y_SK[inverse_S].view(*expert_Tk.shape, y_SK.shape[-1]).sum(1).to(x_TK.dtype)

    def _project(self, name: str, part: MultiLoraParameter | None, x_SK: Tensor, rows: Rows) -> Tensor:
        base = cast(Any, self.base_layer)
        bias = getattr(base, f"{name}_bias") if base.has_bias else None
        y_SD = rows.linear(x_SK, getattr(base, name), bias, base.is_transposed)
        return y_SD if part is None else y_SD + part(x_SK, rows).to(y_SD.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The experts module alone, its parameters merged with the adapters if `merge` (PEFT's protocol).

        `MergeableTuner` has checked all layers before PEFT calls this.
        """
        if merge:
            for part in self.adapted().values():
                part.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer
