"""`FactoredLoraConfig`: the client layer of heterogeneous Fed-ALoRA, with all fields checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from braidlora.adapters._adapter_config import AdapterConfig, check_count, common_problems
from braidlora.adapters._lora_spellings import accepts_lora_spellings
from braidlora.adapters._registration import FACTORED_NAME, extend_peft_type
from braidlora.errors import ConfigError

PEFT_TYPE = extend_peft_type(FACTORED_NAME)


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
        lora_dropout: probability of dropping an element of x before A.
        target_modules: names (suffixes at a dot), a regular expression, or "all-linear". None takes the usual ones
            of a known architecture.
        use_rslora: rank-stabilized scaling (arXiv 2312.03732).
        rank_pattern, alpha_pattern: values for particular modules; keys are suffixes or regular expressions.
        bias: biases of the base model to train: "none", "all", or "factoredlora_only" (those of adapted layers).
        modules_to_save: other modules to train in full and save, e.g. a classification head.
        exclude_modules: modules not to adapt although `target_modules` names them.
        layers_to_transform, layers_pattern: adapt only these layer numbers, e.g. [0, 1] and "layers".
        trainable_token_indices: token embeddings to train, as in PEFT's other methods.
        ensure_weight_tying: must stay False; adapters of tied embeddings are not supported.
        target_parameters: must stay None; only linear modules can be adapted.
        init_weights: False draws B2 and B_base at random too, so that tests see the adapter act from the first step.
            `init_lora_weights`, its name in LoraConfig, is accepted too.
        fused: False always computes in plain torch operations, as in `MultiLoraConfig`.

    Other arguments of LoraConfig are accepted at LoraConfig's default and otherwise refused by name. "lora_only"
    means "factoredlora_only". `fan_in_fan_out` is not needed; a value that contradicts the layer gives a warning.

    Raises:
        ConfigError: with every invalid field, what was given and what is allowed.
    """

    r: int = 8
    r_intermediate: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "factoredlora_only"] = "none"
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    target_parameters: list[str] | None = None
    init_weights: bool = True
    fused: bool = True

    counts: ClassVar = ("r", "r_intermediate")
    bias_of_adapted: ClassVar = "factoredlora_only"

    def __post_init__(self) -> None:
        problems: list[str] = []
        try:
            super().__post_init__()
        except ValueError as error:  # an unknown task_type
            problems.append(f"task_type: {error}")
        self.peft_type = PEFT_TYPE
        self.normalize()
        check_count(problems, "r_intermediate", self.r_intermediate)
        if not isinstance(self.init_weights, bool):
            problems.append(
                f"init_weights is {self.init_weights!r}; it must be True or False ('gaussian' draws LoRA's one A, "
                "and there are three factors here)"
            )
        problems += common_problems(self)
        if self.target_parameters:
            problems.append(
                "target_parameters is not supported: a factored LoRA adapts linear layers only (MultiLoraConfig adapts "
                "experts); name linear modules in target_modules"
            )
        if problems:
            raise ConfigError("FactoredLoraConfig: " + "; ".join(problems))
