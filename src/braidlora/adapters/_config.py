"""`MultiLoraConfig`: what a multi-LoRA adapter is, with all fields checked when it is made."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from braidlora.adapters._adapter_config import AdapterConfig, check_count, check_positive, is_real
from braidlora.adapters._lora_spellings import accepts_lora_spellings
from braidlora.adapters._registration import NAME
from braidlora.adapters.alignment import MEASURES
from braidlora.adapters.sharing import GATES, SCHEMES, by_method


@accepts_lora_spellings
@dataclass
class MultiLoraConfig(AdapterConfig):
    """Configuration of a multi-LoRA adapter: LoRA, ALoRA (shared B), HydraLoRA (shared A) or MoE-LoRA.

    Shapes, formula and defaults follow arXiv 2509.25414; see `MultiLoraLayer` for the layer. The defaults are the
    paper's (three experts of rank 8, alpha 16, B shared), except that dropout is off, as in `LoraConfig`: `alora`,
    `hydralora` and `moelora` have the paper's 0.05.

    The router weighs the experts per token. There is no router per sequence, on purpose: a layer sees neither the
    attention mask nor packing, so a mean over a sequence would include padding.

    Args:
        share: which factor the experts share: "B" (ALoRA), "A" (HydraLoRA) or "none" (MoE-LoRA).
        num_experts: N. With 1 there is no router and the adapter is a plain LoRA.
        r: rank of every expert.
        lora_alpha: the update is scaled by lora_alpha / r (lora_alpha / √r with `use_rslora`), whatever N is.
        lora_dropout: probability of dropping an element of x before the A's. The router sees x undropped.
        target_modules: names (suffixes at a dot), a regular expression, or "all-linear". None takes the usual ones
            of a known architecture.
        dropout_mask: "shared" draws one mask per layer and step for all experts; "per_expert" draws one for every A
            (as the paper's research code does), at the cost of a full-width pass each.
        use_rslora: rank-stabilized scaling (arXiv 2312.03732).
        gate: what weighs the experts: "token" is a router that reads x, softmax(W_g x / τ); "task" has a weight vector
            per task, softmax(v_t / τ), and the model must be told the rows' tasks (`for_tasks`); "uniform" is 1 / N.
        task_names: the tasks of a gate or map by task, in the order of their numbers.
        task_map: multiplies A x by a matrix Λ_t (r, r) of its task, which starts as the identity (MTL-LoRA).
        alignment_loss: weight of the alignment loss (`alignment`), which a training loop adds: `train` does.
        alignment: its measure, "mmd" or "kl".
        router_temperature: τ in the softmax.
        balance_loss: weight of a load-balancing loss (`functional.balance_loss`); 0, as in the paper, is off. Every
            layer adds its gradient in backward, in the scale of the loss, so gradient accumulation, loss scalers and
            any training loop work unchanged; the reported loss does not include it. It covers the tokens of one
            forward pass, without padding if the model gets an `attention_mask` and the layer sees its tokens in that
            order. For a loss computed outside the model, call `braidlora.adapters.with_balance_loss`.
        rank_pattern, alpha_pattern: values for particular modules; keys are suffixes or regular expressions.
        bias: biases of the base model to train: "none", "all", or "braidlora_only" (those of adapted layers).
        modules_to_save: other modules to train in full and save, e.g. a classification head.
        exclude_modules: modules not to adapt although `target_modules` names them.
        layers_to_transform, layers_pattern: adapt only these layer numbers, e.g. [0, 1] and "layers".
        trainable_token_indices: token embeddings to train, as in PEFT's other methods.
        ensure_weight_tying: must stay False; adapters of tied embeddings are not supported.
        target_parameters: names (suffixes at a dot) of stacked experts to adapt, e.g. ["experts.gate_up_proj",
            "experts.down_proj"]; see `MultiLoraParameter`. "all-linear" adds them for the base models for which
            PEFT's LoRA does.
        init_weights: False draws B at random too, so that tests see the adapter act from the first step; "gaussian"
            draws every A from N(0, 1/r²); "identical" starts all experts from the same A, to reproduce how alike
            A's of one seed stay. `init_lora_weights`, its name in LoraConfig, is accepted too.
        fused: False always computes in plain torch operations. By default autograd functions with fewer passes
            over memory are used, except under compilation, tracing and function transforms.

    Other arguments of LoraConfig are accepted at LoraConfig's default and otherwise rejected by name. "lora_only"
    means "braidlora_only". `fan_in_fan_out` is not needed; a value that contradicts the layer gives a warning.

    Raises:
        ConfigError: with every invalid field, what was given and what is allowed.
    """

    share: str = "B"
    num_experts: int = 3
    gate: Literal["token", "task", "uniform"] = "token"
    task_names: list[str] | None = None
    task_map: bool = False
    alignment_loss: float = 0.0
    alignment: Literal["mmd", "kl"] = "mmd"
    dropout_mask: Literal["shared", "per_expert"] = "shared"
    router_temperature: float = 1.0
    balance_loss: float = 0.0

    type_name: ClassVar = NAME
    bias_of_adapted: ClassVar = "braidlora_only"
    counts: ClassVar = ("r", "num_experts")
    reals: ClassVar = ("lora_alpha", "lora_dropout", "router_temperature", "balance_loss", "alignment_loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout_mask == "per_expert" and ("A" in SCHEMES[self.share].shared or self.num_experts == 1):
            warnings.warn(
                "dropout_mask='per_expert' draws one mask per A matrix, and there is only one A here "
                f"(share={self.share!r}, num_experts={self.num_experts}): it is the same as 'shared'",
                stacklevel=4,
            )

    def own_problems(self) -> list[str]:
        problems: list[str] = []
        if self.share not in SCHEMES:
            known = ", ".join(f"{scheme.share!r} ({scheme.label})" for scheme in SCHEMES.values())
            problems.append(f"share is {self.share!r}; it must be one of {known}")
        check_count(problems, "num_experts", self.num_experts)
        check_positive(problems, "router_temperature", self.router_temperature)
        if not is_real(self.balance_loss) or self.balance_loss < 0.0:
            problems.append(
                f"balance_loss is {self.balance_loss!r}; it must be a finite number, 0 (off) or more"
            )
        problems += self._task_problems()
        if self.dropout_mask not in ("shared", "per_expert"):
            problems.append(f"dropout_mask is {self.dropout_mask!r}; it must be 'shared' or 'per_expert'")
        if not isinstance(self.init_weights, bool) and self.init_weights not in ("gaussian", "identical"):
            problems.append(
                f"init_weights is {self.init_weights!r}; it must be True, False, 'gaussian' or 'identical'"
            )
        names = self.target_parameters
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            problems.append(
                f"target_parameters is {names!r}; it must be a list of parameter names such as "
                "['experts.gate_up_proj', 'experts.down_proj']"
            )
        return problems

    @property
    def by_task(self) -> bool:
        """Whether the layer must know the tasks of its rows."""
        return (self.gate == "task" and self.num_experts > 1) or self.task_map

    def _task_problems(self) -> list[str]:
        problems = []
        if self.gate not in GATES:
            problems.append(f"gate is {self.gate!r}; it must be one of {', '.join(map(repr, GATES))}")
        if self.alignment not in MEASURES:
            problems.append(f"alignment is {self.alignment!r}; it must be {' or '.join(map(repr, MEASURES))}")
        if not is_real(self.alignment_loss) or self.alignment_loss < 0.0:
            problems.append(
                f"alignment_loss is {self.alignment_loss!r}; it must be a finite number, 0 (off) or more"
            )
        if not isinstance(self.task_map, bool):
            problems.append(f"task_map is {self.task_map!r}; it must be true or false")
        names = self.task_names
        if names is not None and (
            not names
            or not all(isinstance(name, str) and name for name in names)
            or len({*names}) < len(names)
        ):
            problems.append(f"task_names is {names!r}; it must be a list of different names")
        elif names is None and (self.gate == "task" or self.task_map):
            what = "gate='task'" if self.gate == "task" else "task_map=True"
            problems.append(f"{what} needs task_names, the tasks in the order of their numbers")
        if self.balance_loss and self.gate != "token":
            problems.append(
                f"balance_loss is for a router that reads the token; with gate={self.gate!r} it has nothing to balance"
            )
        if self.target_parameters and (problem := self.problem_with_parameters()):
            problems.append(problem.removesuffix("."))
        return problems

    def problem_with_parameters(self) -> str:
        """Why these settings do not go with stacked experts; empty if they do."""
        if self.gate == "token" and not self.task_map and not self.alignment_loss:
            return ""
        return (
            "target_parameters: inside a mixture-of-experts block rows cannot be distinguished, so gate must be "
            "'token', without task_map and alignment_loss."
        )

    @classmethod
    def of_method(cls, method: str, **settings: Any) -> MultiLoraConfig:
        """The method that recipes call by this name, at its publication's settings; `settings` override them."""
        scheme = by_method()[method]
        return cls(**{"share": scheme.share, **scheme.defaults, **settings})

    @classmethod
    def alora(cls, **settings: Any) -> MultiLoraConfig:
        """ALoRA as in arXiv 2509.25414: three A of rank 8, one B, alpha 16, dropout 0.05. `settings` override."""
        return cls.of_method("alora", **settings)

    @classmethod
    def hydralora(cls, **settings: Any) -> MultiLoraConfig:
        """HydraLoRA (arXiv 2404.19245) as arXiv 2509.25414 compares it: one A, three B of rank 8, alpha 16.

        HydraLoRA's own script has alpha 32 and finds the number of B by clustering the data. `settings` override.
        """
        return cls.of_method("hydralora", **settings)

    @classmethod
    def mtl_lora(cls, task_names: list[str], **settings: Any) -> MultiLoraConfig:
        """MTL-LoRA (arXiv 2410.09437): one A, three B weighted by task, and a map Λ_t. `settings` override."""
        return cls.of_method("mtl-lora", task_names=list(task_names), **settings)

    @classmethod
    def align_lora(cls, **settings: Any) -> MultiLoraConfig:
        """Align-LoRA: one LoRA, trained with the alignment loss between tasks. `settings` override."""
        return cls.of_method("align-lora", **settings)

    @classmethod
    def moelora(cls, **settings: Any) -> MultiLoraConfig:
        """A dense mixture of LoRAs that share nothing, at the settings of the other two. `settings` override.

        The router reads the token. The router of MOELoRA (arXiv 2310.18339) reads a task embedding, which does not
        exist for unknown tasks at inference and is not offered.
        """
        return cls.of_method("moelora", **settings)
