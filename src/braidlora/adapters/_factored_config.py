"""`FactoredLoraConfig`: the client layer of heterogeneous Fed-ALoRA, with all fields checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from braidlora.adapters._adapter_config import AdapterConfig, check_count
from braidlora.adapters._lora_spellings import accepts_lora_spellings
from braidlora.adapters._registration import FACTORED_NAME


@accepts_lora_spellings
@dataclass
class FactoredLoraConfig(AdapterConfig):
    """Configuration of a factored LoRA: ΔW = s·(B_base + B2 B1) M A (arXiv 2509.25414, heterogeneous ranks).

    Clients of different ranks r share one intermediate rank m, and so one shape (d, m) for what a server averages:
    B2 B1, accumulated in the frozen B_base. Defaults are the paper's m = 16 and s = 2; dropout is off, as in
    `LoraConfig`.

    Args:
        r: the client's own rank.
        r_intermediate: m, the same for all clients.
        lora_alpha: the update is scaled by s = lora_alpha / r (lora_alpha / √r with `use_rslora`). Averaging needs
            the same s for all clients, hence an alpha proportional to the rank.
        init_weights: False draws B2 and B_base at random too, so that tests see the adapter act from the first step.
        bias: "none", "all", or "factoredlora_only" (biases of adapted layers).
        target_parameters: must stay None; only linear modules can be adapted.

    All other arguments are those of `MultiLoraConfig`, without its experts.

    Raises:
        ConfigError: with every invalid field, what was given and what is allowed.
    """

    r_intermediate: int = 16

    type_name: ClassVar = FACTORED_NAME
    bias_of_adapted: ClassVar = "factoredlora_only"
    counts: ClassVar = ("r", "r_intermediate")

    def own_problems(self) -> list[str]:
        problems: list[str] = []
        check_count(problems, "r_intermediate", self.r_intermediate)
        if not isinstance(self.init_weights, bool):
            problems.append(
                f"init_weights is {self.init_weights!r}; it must be True or False ('gaussian' draws LoRA's one A, "
                "and there are three factors here)"
            )
        if self.target_parameters:
            problems.append(
                "target_parameters is not supported: a factored LoRA adapts linear layers only (MultiLoraConfig adapts "
                "experts); name linear modules in target_modules"
            )
        return problems
