"""`FactoredLoraLayer`: a linear layer of any kind with factored LoRAs around it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braidlora.adapters._adapter_layer import AdapterLayer, Weights
from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.adapters._fused import Expand, Shrink
from braidlora.adapters._fusion import linear_in_dtype_of
from braidlora.adapters._gate import Gate
from braidlora.adapters._no_grad import Factors as Multipliers
from braidlora.adapters._products import stack, transposed
from braidlora.adapters.functional import at_least_float32


class Factors(NamedTuple):
    """An adapter's five matrices: A (r, k), M (m, r), B1 (r, m), B2 (d, r) and the frozen base (d, m)."""

    A: nn.Linear
    M: nn.Linear
    B1: nn.Linear
    B2: nn.Linear
    base: nn.Linear


class FactoredLoraLayer(AdapterLayer):
    """A frozen linear layer with factored LoRAs.

        y = W0 x + s·(B_base + B2 B1) M A x,   s = alpha / r        (arXiv 2509.25414, heterogeneous ranks)

        x (…, k) ─► A (r, k) ─► M (m, r) ─┬───────────────► B_base (d, m), frozen ─┐
                                          └─► B1 (r, m) ──► B2 (d, r) ─────────────┴─► · s + W0 x

    No d × k matrix is formed, and x is read once; B_base and B2 are one matrix product.
    """

    adapter_layer_names = ("factoredlora_A", "factoredlora_M", "factoredlora_B1", "factoredlora_B2")
    # The base is not among the above, which PEFT makes trainable whenever it sets an adapter active.
    other_param_names = (
        "factoredlora_base", "r", "r_intermediate", "lora_alpha", "use_rslora", "scaling", "lora_dropout", "fused",
    )  # fmt: skip

    def _add_factors(self) -> None:
        super()._add_factors()
        self.factoredlora_base = nn.ModuleDict()
        self.r_intermediate: dict[str, int] = {}

    def _make_factors(self, adapter_name: str, config: FactoredLoraConfig, r: int) -> None:
        m, k, d = config.r_intermediate, self.in_features, self.out_features
        for factor, (inside, outside) in {
            "A": (k, r), "M": (r, m), "B1": (m, r), "B2": (r, d), "base": (m, d),
        }.items():  # fmt: skip
            getattr(self, f"factoredlora_{factor}")[adapter_name] = nn.Linear(inside, outside, bias=False)
        self.linears(adapter_name).base.requires_grad_(False)

    def configure(self, adapter_name: str, config: FactoredLoraConfig, r: int, lora_alpha: float) -> None:
        """Take over an adapter's settings, but not its weights."""
        super().configure(adapter_name, config, r, lora_alpha)
        self.r_intermediate[adapter_name] = config.r_intermediate

    def reset_parameters(self, adapter_name: str, init_weights: bool | str = True) -> None:
        """Draw A, M and B1 Kaiming-uniform(a = √5); B2 and the base are zero, or drawn too without `init_weights`."""
        A, M, B1, B2, base = self.linears(adapter_name)
        for linear in (A, M, B1) if init_weights else (A, M, B1, B2, base):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(B2.weight)
            nn.init.zeros_(base.weight)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The attributes that hold the adapter's matrices, the frozen base included."""
        return (*self.adapter_layer_names, "factoredlora_base")

    def linears(self, adapter_name: str) -> Factors:
        """The adapter's matrices as modules."""
        return Factors(*(self.factor(f"factoredlora_{f}", adapter_name) for f in Factors._fields))

    def _shrink(self, x: Tensor, name: str, weights: Weights, fork: bool, own: bool) -> tuple[Tensor, Tensor]:
        A, M, B1, _, _ = weights
        result = Shrink.apply(x, A, None, self._dropout(name), 0, fork, own)
        h, x = result if fork else (result, x)
        # [g | B1 g] (T, m + r) with g = M h, from h = A x (T, r).
        g = F.linear(h, M.to(h.dtype))
        return torch.cat([g, F.linear(g, B1.to(h.dtype))], -1), x

    def _expand(
        self, y: Tensor, z: Tensor, name: str, weights: Weights, in_place: bool, shape: torch.Size
    ) -> Tensor:
        _, _, _, B2, base = weights
        # A gate of one expert adds s · z [B_base | B2]ᵀ.
        gate = Gate("B", 1, z.shape[-1], 1.0, 0.0)
        expanded: Tensor = Expand.apply(y, z, torch.cat([base, B2], 1), self.scaling[name], gate, in_place)
        return expanded

    def _multipliers(self, name: str, weights: Weights, x: Tensor) -> Multipliers:
        A, B = to_plain_lora(*map(at_least_float32, weights))
        return Multipliers(stack(A, None, 0, x), transposed(B, x))

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """The adapter's update (…, d) in plain operations: compiled or sharded."""
        A, M, B1, B2, base = self.linears(name)
        dropout = self._dropout(name)
        g = linear_in_dtype_of(M, linear_in_dtype_of(A, F.dropout(x, dropout) if dropout else x))
        own = linear_in_dtype_of(B2, linear_in_dtype_of(B1, g))
        return (linear_in_dtype_of(base, g) + own) * self.scaling[name]

    def plain_lora(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A' (m, k) and B' (d, m) of the plain LoRA of rank m that equals this adapter at its scaling s."""
        return to_plain_lora(*(linear.weight.detach() for linear in self.linears(adapter_name)))

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
