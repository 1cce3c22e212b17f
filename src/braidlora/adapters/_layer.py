"""`MultiLoraLayer`: a linear layer of any kind with multi-LoRA adapters around it."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braidlora.adapters import functional, task_gates
from braidlora.adapters._adapter_layer import AdapterLayer, Weights
from braidlora.adapters._balance import Attachment, BalanceScope
from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters._fused import AdaptedLinear, Expand, Shrink, without_autocast
from braidlora.adapters._fusion import frozen_product, is_one_position, is_plain, linear_in_dtype_of
from braidlora.adapters._gate import Gate, gated_without_gradients, padding_for
from braidlora.adapters._no_grad import Factors
from braidlora.adapters._products import stack, transposed
from braidlora.adapters._tasks import task_numbers
from braidlora.adapters.alignment import collected
from braidlora.adapters.sharing import SCHEMES
from braidlora.adapters.task_gates import TaskGate
from braidlora.errors import ConfigError, MergeError

_MERGE_ALTERNATIVES = (
    "Its expert weights depend on the token, so no single weight matrix equals it. Alternatives: keep the adapter "
    "(`PeftModel.from_pretrained` loads it on the base model); or fix the expert weights, e.g. to their mean on one "
    "task, with `braidlora export`, which writes a plain LoRA that PEFT can merge and reports what the "
    "approximation costs. A trainer that merges in order to generate, as TRL's GRPO with use_vllm=True does, works "
    "with use_vllm=False, or with num_experts=1."
)


class MultiLoraLayer(AdapterLayer):
    """A frozen linear layer with N LoRA experts that share a factor, weighted per token by a router.

        y = W0 x + s·B Σᵢ wᵢ(x) Aᵢ x  (share="B", ALoRA),   w(x) = softmax(W_g x / τ),   s = alpha / r

    The other schemes are in `sharing` and `functional`. Source: arXiv 2509.25414, section 3.

    Per adapter name there are three `nn.Linear` without bias, in float32 under a 16-bit base unless PEFT is asked for
    another dtype (`autocast_adapter_dtype=False`):

        share    braidlora_A.weight   braidlora_router.weight   braidlora_B.weight
        "B"      (N·r, k)             (N, k)                    (d, r)
        "A"      (r, k)               (N, k)                    (d, N·r)
        "none"   (N·r, k)             (N, k)                    (d, N·r)

    Expert i owns rows, or columns, i·r … (i+1)·r − 1. With N = 1 there is no router and the layer is LoRA.

    With gate="task" the router (N, T) reads the task instead of x: w = softmax(W_g e_t / τ). With gate="uniform" there
    is none. `task_map` adds `braidlora_map` (T·r, r), whose rows t·r … are Λ_t, by which every Aᵢ x is multiplied.
    """

    adapter_layer_names = ("braidlora_A", "braidlora_router", "braidlora_B", "braidlora_map")
    other_param_names = (
        "r", "lora_alpha", "use_rslora", "scaling", "lora_dropout", "dropout_mask", "gate", "task_gate", "fused",
    )  # fmt: skip
    blocks = 1  # how many linear layers side by side this is; more in `MultiLoraParameter`
    braidlora_A: nn.ModuleDict  # noqa: N815 (the name in PEFT's state dict)
    braidlora_router: nn.ModuleDict
    braidlora_B: nn.ModuleDict  # noqa: N815
    braidlora_map: nn.ModuleDict

    def _add_factors(self) -> None:
        self.dropout_mask: dict[str, str] = {}
        self.gate: dict[str, Gate] = {}
        self.task_gate: dict[str, TaskGate] = {}
        self.balance = BalanceScope()
        super()._add_factors()

    def _make_factors(self, adapter_name: str, config: MultiLoraConfig, r: int) -> None:
        rows_A, columns_B = functional.stacked_ranks(config.share, config.num_experts, r)
        k, d, blocks = self.in_features, self.out_features, self.blocks
        self.braidlora_A[adapter_name] = nn.Linear(k, blocks * rows_A, bias=False)
        if self.task_gate[adapter_name].has_router:
            reads = k if config.gate == "token" else len(config.task_names or ())
            self.braidlora_router[adapter_name] = nn.Linear(reads, blocks * config.num_experts, bias=False)
        if config.task_map:
            tasks = len(config.task_names or ())
            self.braidlora_map[adapter_name] = nn.Linear(r, tasks * r, bias=False)
        self.braidlora_B[adapter_name] = nn.Linear(blocks * columns_B, d, bias=False)

    def configure(self, adapter_name: str, config: MultiLoraConfig, r: int, lora_alpha: float) -> None:
        """Take over an adapter's settings, but not its weights."""
        super().configure(adapter_name, config, r, lora_alpha)
        self.dropout_mask[adapter_name] = config.dropout_mask
        self.gate[adapter_name] = Gate(
            config.share, config.num_experts, r, config.router_temperature, config.balance_loss
        )
        task_gate = self.task_gate[adapter_name] = TaskGate.of(config)
        if (task_gate.plain_only or task_gate.aligned) and self.blocks > 1:
            raise ConfigError(
                "rows cannot be distinguished inside a mixture-of-experts block: leave its experts out of "
                "target_modules, or use gate='token' without task_map and alignment_loss."
            )

    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw every A_i and the router Kaiming-uniform(a = √5); B is zero, or drawn too without `init_weights`.

        "gaussian" draws every A_i from N(0, 1/r²) instead, as PEFT's LoRA does; "identical" draws one A for all i.
        """
        # Bound and deviation do not depend on the rows, so one draw of the stack is N independent draws of its blocks.
        A, router, B = self.linears(adapter_name)
        if init_weights == "gaussian":
            nn.init.normal_(A.weight, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        if init_weights == "identical":
            rank = self.r[adapter_name]
            with torch.no_grad():
                A.weight.copy_(A.weight[:rank].repeat(A.out_features // rank, 1))
        if router is not None and self.task_gate[adapter_name].gate == "task":
            bound = 1 / math.sqrt(router.out_features)  # of V (T, N) Kaiming-uniform with a = √5
            nn.init.uniform_(router.weight, -bound, bound)
        elif router is not None:
            nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
        if adapter_name in self.braidlora_map:
            identity = torch.eye(self.r[adapter_name])
            with torch.no_grad():
                cast(nn.Linear, self.braidlora_map[adapter_name]).weight.copy_(
                    identity.repeat(len(self.task_gate[adapter_name].names), 1)
                )
        if init_weights:
            nn.init.zeros_(B.weight)
        else:
            nn.init.kaiming_uniform_(B.weight, a=math.sqrt(5))

    def linears(self, adapter_name: str) -> tuple[nn.Linear, nn.Linear | None, nn.Linear]:
        """A, router (None for N = 1) and B of an adapter."""
        router = (
            self.factor("braidlora_router", adapter_name) if self.task_gate[adapter_name].has_router else None
        )
        return self.factor("braidlora_A", adapter_name), router, self.factor("braidlora_B", adapter_name)

    def _is_plain_only(self, name: str) -> bool:
        """Whether only plain operations will do: the others know a router that reads the token, and keep A x."""
        task_gate = self.task_gate[name]
        # In all of training: a checkpoint must run again what it ran, whether or not A x is collected then.
        return task_gate.plain_only or (task_gate.aligned and self.training)

    def _factors(self, name: str, x: Tensor) -> Factors | None:
        return None if self._is_plain_only(name) else super()._factors(name, x)

    def _fuses(self, name: str) -> bool:
        return (
            self.fused[name]
            and (self._dropout(name) == 0.0 or self.dropout_mask[name] == "shared")
            and not self._is_plain_only(name)
        )

    def _forward_in_one(self, x: Tensor, base_layer: nn.Module, weights: dict[str, Weights]) -> Tensor | None:
        product = frozen_product(base_layer, x)
        if product is None:
            return None
        ((name, (A, router, B)),) = weights.items()
        gate, balance = self._gate_of(name, x.shape)
        settings = (
            self._dropout(name),
            padding_for(gate, A.shape[0], x.numel()),
            self.scaling[name],
            gate,
            balance,
        )
        with without_autocast(x):
            y: Tensor = AdaptedLinear.apply(x, *product, A, router, B, settings)
        return y

    def _gate_of(self, name: str, shape: torch.Size) -> tuple[Gate, Attachment | None]:
        """The gate as it acts now on an x of this shape, and its part in the balance loss, if any."""
        gate = self.gate[name]
        if not gate.balance:
            return gate, None
        if self.training and gate.num_experts > 1:
            return gate, Attachment(self.balance, gate.balance, shape[:-1])
        return gate._replace(balance=0.0), None

    def _shrink(self, x: Tensor, name: str, weights: Weights, fork: bool, own: bool) -> tuple[Tensor, Tensor]:
        A, router, _ = weights
        padding = padding_for(self.gate[name], A.shape[0], x.numel())
        result = Shrink.apply(x, A, router, self._dropout(name), padding, fork, own)
        return result if fork else (result, x)

    def _expand(
        self, y: Tensor, z: Tensor, name: str, weights: Weights, in_place: bool, shape: torch.Size
    ) -> Tensor:
        gate, balance = self._gate_of(name, shape)
        expanded: Tensor = Expand.apply(y, z, weights[2], self.scaling[name], gate, in_place, balance)
        return expanded

    def _multipliers(self, name: str, weights: Weights, x: Tensor) -> Factors:
        A, router, B = weights
        is_step = router is None or is_one_position(x)
        padding = 0 if is_step else padding_for(self.gate[name], A.shape[0], x.numel())
        return Factors(stack(A, router, padding, x), transposed(B, x))

    def _mixed(self, z_T1P: Tensor, factors: Factors, name: str) -> Tensor:
        return gated_without_gradients(z_T1P, self.gate[name])

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """The adapter's update (…, d) in plain operations: compiled, sharded, or with a mask per expert."""
        gate, task_gate = self.gate[name], self.task_gate[name]
        B = self.linears(name)[2]
        h = self._shrink_plainly(x, name)
        if task_gate.aligned and self.training and (parts := collected()) is not None:
            parts.append(h)
        if name in self.braidlora_map:
            ids = task_numbers(task_gate.names, x.shape[:-1], x.device)
            h = task_gates.mapped(h, cast(nn.Linear, self.braidlora_map[name]).weight, ids)
        if gate.num_experts > 1:
            h = functional.mix(h, self.expert_weights(x, name), gate.share).to(h.dtype)
        return linear_in_dtype_of(B, h) * self.scaling[name]

    def expert_weights(self, x: Tensor, name: str) -> Tensor:
        """The weights of the experts for tokens x (…, k), that broadcast to (…, N)."""
        gate, task_gate, router = self.gate[name], self.task_gate[name], self.linears(name)[1]
        if router is None:
            return task_gates.uniform_weights(gate.num_experts, x)
        if task_gate.gate == "task":
            ids = task_numbers(task_gate.names, x.shape[:-1], x.device)
            return task_gates.task_weights(router.weight, gate.temperature)[ids]
        w = functional.gate_weights(linear_in_dtype_of(router, x), gate.temperature)
        if gate.balance and self.training:
            w = self.balance.attach(w.flatten(0, -2), gate.balance, x.shape[:-1]).view_as(w)
        return w

    def _shrink_plainly(self, x: Tensor, name: str) -> Tensor:
        """x Aᵀ (…, G), with x dropped out as the adapter is configured."""
        A, dropout, gate = self.linears(name)[0], self._dropout(name), self.gate[name]
        if dropout == 0.0:
            return linear_in_dtype_of(A, x)
        if self.has_one_mask(name):
            return linear_in_dtype_of(A, F.dropout(x, dropout))
        # One mask per A: every expert keeps its own r columns of a shrink with its own mask.
        blocks = [slice(i * gate.r, (i + 1) * gate.r) for i in range(gate.num_experts)]
        if is_plain(A, x):
            weight = A.weight.to(x.dtype)
            return torch.cat([F.linear(F.dropout(x, dropout), weight[block]) for block in blocks], -1)
        return torch.cat([linear_in_dtype_of(A, F.dropout(x, dropout))[..., block] for block in blocks], -1)

    def has_one_mask(self, name: str) -> bool:
        """Whether one dropout mask serves all experts, by configuration or because they share A."""
        return self.dropout_mask[name] == "shared" or "A" in SCHEMES[self.gate[name].share].shared

    def plain_lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (r, k) and B (d, r) of the plain LoRA that this adapter is; raises MergeError if it has a router."""
        self._check_mergeable(adapter_name)
        A, _, B = self.linears(adapter_name)
        gate = self.gate[adapter_name]
        if gate.num_experts == 1:
            return A.weight, B.weight
        w_N = task_gates.uniform_weights(gate.num_experts, A.weight)
        return functional.static_factors(A.weight, B.weight, w_N, gate.share)

    def _check_mergeable(self, name: str) -> None:
        gate, task_gate = self.gate[name], self.task_gate[name]
        if task_gate.by_task:
            raise MergeError(
                f"adapter {name!r} has different weights for each of its tasks ({', '.join(task_gate.names)}), so it "
                "cannot be merged directly. `braidlora export --static-weights=task=NAME` writes an exact plain "
                "LoRA for one task, which PEFT can merge."
            )
        if gate.num_experts > 1 and task_gate.gate == "token":
            raise MergeError(
                f"adapter {name!r} has num_experts={gate.num_experts} and cannot be merged. {_MERGE_ALTERNATIVES}"
            )
        super()._check_mergeable(name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a LoRA: a token-routed one has no weight update to factorize."""
        if adapter_name not in self.gate:
            return False
        gate, task_gate = self.gate[adapter_name], self.task_gate[adapter_name]
        return not task_gate.by_task and (gate.num_experts == 1 or task_gate.gate == "uniform")

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: share={gate.share}, num_experts={gate.num_experts}, r={gate.r}{self.task_gate[name].in_words()}"
            for name, gate in self.gate.items()
        )
