"""The sharing schemes, said once: which factors the experts of a multi-LoRA have in common. Imports no torch.

Every scheme is made of the same parts: N experts of rank r, their A's stacked as blocks of r rows, their B's stacked
as blocks of r columns, and a router that weighs the experts per token. A scheme arranges these blocks. `functional`
has its arithmetic; recipes, plans, comparisons, exports and analyses read the rest here.

A new scheme takes an entry in `SCHEMES`, and, where it combines the blocks in a new way, its arithmetic in
`functional` (`mix`, `mix_backward`, `static_factors`). `_triton_gate` fuses the gate of the schemes that it lists;
the others are computed in plain operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Of arXiv 2509.25414, which compares all schemes at these settings. Recipes start from them.
PAPER: dict[str, Any] = {"num_experts": 3, "r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05}


@dataclass(frozen=True)
class SharingScheme:
    """One arrangement of the experts' blocks.

    Attributes:
        share: its key, `share` in adapter_config.json; None for LoRA.
        method: `adapter.method` in a recipe, and the row of a comparison.
        label: its name in tables.
        formula: the layer, as text.
        static: A and B of the plain LoRA that it is under fixed expert weights, as text.
        per_expert: the factors, among "A" and "B", of which every expert has its own block.
        router: whether a router weighs the experts.
        experts: the number of experts, where the method has a fixed one.
        defaults: the settings of its publication; recipes take from it what they leave open (`gate`, `task_map`, …).
    """

    share: str | None
    method: str
    label: str
    formula: str
    static: str
    per_expert: tuple[str, ...]
    router: bool = True
    experts: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=lambda: dict(PAPER))

    def blocks(self, num_experts: int) -> tuple[int, int]:
        """How many blocks of r rows A has, and how many blocks of r columns B has."""
        return (num_experts if "A" in self.per_expert else 1, num_experts if "B" in self.per_expert else 1)

    @property
    def shared(self) -> tuple[str, ...]:
        """The factors, among "A" and "B", that all experts share."""
        return tuple(factor for factor in ("A", "B") if factor not in self.per_expert)

    @property
    def title(self) -> str:
        """Label and what is shared, e.g. `ALoRA (shared B)`."""
        return f"{self.label} ({'shared ' + ' and '.join(self.shared) if self.shared else 'nothing shared'})"


# By `share`.
SCHEMES: dict[str, SharingScheme] = {
    "B": SharingScheme(
        share="B",
        method="alora",
        label="ALoRA",
        formula="y = W0 x + s·B Σᵢ wᵢ(x) Aᵢ x",
        static="A = Σ wᵢAᵢ and B = B",
        per_expert=("A",),
    ),
    "A": SharingScheme(
        share="A",
        method="hydralora",
        label="HydraLoRA",
        formula="y = W0 x + s·Σᵢ wᵢ(x) Bᵢ A x",
        static="A = A and B = Σ wᵢBᵢ",
        per_expert=("B",),
    ),
    "none": SharingScheme(
        share="none",
        method="moelora",
        label="MoE-LoRA",
        formula="y = W0 x + s·Σᵢ wᵢ(x) Bᵢ Aᵢ x",
        static="A = [Aᵢ] and B = [wᵢBᵢ], stacked",
        per_expert=("A", "B"),
    ),
}
DEFAULT = SCHEMES["B"]  # of MultiLoraConfig and of recipes
# One expert, and so no router. In recipes this is PEFT's own LoRA.
LORA = SharingScheme(
    share=None,
    method="lora",
    label="LoRA",
    formula="y = W0 x + s·B A x",
    static="A = A and B = B",
    per_expert=(),
    router=False,
)

# Methods that are an arrangement above with other settings, by the method that recipes name.
PRESETS: dict[str, SharingScheme] = {
    "mtl-lora": SharingScheme(
        share="A",
        method="mtl-lora",
        label="MTL-LoRA",
        formula="y = W0 x + s·Σᵢ w_tᵢ Bᵢ Λ_t A x",
        static="A = Λ_t A and B = Σ w_tᵢBᵢ",
        per_expert=("B",),
        defaults={**PAPER, "gate": "task", "task_map": True},
    ),
    "align-lora": SharingScheme(
        share="B",
        method="align-lora",
        label="Align-LoRA",
        formula="y = W0 x + s·B A x",
        static="A = A and B = B",
        per_expert=(),
        router=False,
        experts=1,
        defaults={**PAPER, "num_experts": 1, "alignment_loss": 0.2, "alignment": "kl"},
    ),
}
# What the experts of a token are weighted by: a router that reads the token, its task, or nothing.
GATES = ("token", "task", "uniform")


def by_method() -> dict[str, SharingScheme]:
    """The schemes and presets by the method that recipes name, LoRA last."""
    return {scheme.method: scheme for scheme in (*SCHEMES.values(), *PRESETS.values(), LORA)}


def formula_of(config: Mapping[str, Any]) -> str:
    """The layer of an adapter_config.json as text: that of its arrangement, with its gate and map."""
    if config.get("num_experts", 1) == 1:
        formula = LORA.formula
    else:
        formula = SCHEMES[str(config["share"])].formula
    gate = config.get("gate", "token")
    if gate != "token":
        formula = formula.replace("wᵢ(x)", "w_tᵢ" if gate == "task" else "1/N")
    if config.get("task_map"):
        formula = (
            formula.replace("Aᵢ x", "Λ_t Aᵢ x") if "Aᵢ x" in formula else formula.replace("A x", "Λ_t A x")
        )
    return formula


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s = alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732), whatever N is."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
