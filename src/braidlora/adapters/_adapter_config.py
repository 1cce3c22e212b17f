"""What our PEFT configurations have in common: plain numbers, checked fields, and files that say how to load."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from braidlora.adapters._card import add_loading_section
from braidlora.adapters._lora_spellings import NOTE
from braidlora.adapters._peft_compat import CONFIG_NAME, get_pattern_key
from braidlora.adapters._registration import extend_peft_type
from braidlora.adapters.sharing import lora_scaling
from braidlora.errors import ConfigError


@dataclass
class AdapterConfig(PeftConfig):
    """Base class of our configurations, with the fields that all have; `MultiLoraConfig` documents them."""

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    target_parameters: list[str] | None = None
    init_weights: bool | str = True
    fused: bool = True

    type_name: ClassVar[str]  # of the PEFT type
    bias_of_adapted: ClassVar[str]  # the value of `bias` that trains the biases of adapted layers
    counts: ClassVar[tuple[str, ...]] = ("r",)
    reals: ClassVar[tuple[str, ...]] = ("lora_alpha", "lora_dropout")
    _fan_in_fan_out: ClassVar[bool | None] = None

    def __post_init__(self) -> None:
        problems = []
        try:
            super().__post_init__()
        except ValueError as error:  # an unknown task_type
            problems.append(f"task_type: {error}")
        self.peft_type = extend_peft_type(self.type_name)
        self.normalize()
        problems += self.own_problems() + common_problems(self)
        if problems:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(problems))

    def own_problems(self) -> list[str]:
        """What is wrong with the subclass's own fields, as sentences."""
        raise NotImplementedError

    @property
    def init_lora_weights(self) -> Any:
        """LoRA's name for `init_weights`, for code that reads it."""
        return self.__dict__["init_weights"]

    @init_lora_weights.setter
    def init_lora_weights(self, value: Any) -> None:
        self.__dict__["init_weights"] = value

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """A module's rank and alpha, after `rank_pattern` and `alpha_pattern`.

        Args:
            module: its full name in the base model.
        """
        r = self.rank_pattern.get(get_pattern_key(self.rank_pattern, module), self.r)
        return r, self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, module), self.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """s of one module, after the patterns."""
        r, lora_alpha = self.rank_and_alpha(module)
        return lora_scaling(lora_alpha, r, self.use_rslora)

    def normalize(self) -> None:
        """Turn NumPy's numbers and any iterables into plain numbers, lists and sets, and LoRA's `bias` into ours."""
        for name in self.counts:
            setattr(self, name, plain_int(getattr(self, name)))
        for name in self.reals:
            setattr(self, name, plain_number(getattr(self, name)))
        self.rank_pattern = {key: plain_int(rank) for key, rank in dict(self.rank_pattern or {}).items()}
        alphas = dict(self.alpha_pattern or {})
        self.alpha_pattern = {key: plain_number(alpha) for key, alpha in alphas.items()}
        if self.bias == "lora_only":
            self.bias = self.bias_of_adapted
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(value))
        if isinstance(self.target_parameters, (tuple, set)):
            self.target_parameters = sorted(self.target_parameters)
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)  # PEFT extends it for classifiers
        self.layers_to_transform = _plain(self.layers_to_transform)
        self.trainable_token_indices = _plain(self.trainable_token_indices)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with a note for readers, and how to load the adapter into README.md."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved[NOTE] = "pip install braidlora; then `import braidlora` before PEFT loads this adapter"
        path.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")
        add_loading_section(Path(save_directory), saved)


def plain_int(value: Any) -> Any:
    """8, numpy.int64(8) and 8.0 as 8; anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(float(value)) if float(value).is_integer() else value


def plain_number(value: Any) -> Any:
    """A number of any library as a Python int or float; anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _plain(value: Any) -> Any:
    """Integers, lists of integers, and mappings to such lists, with plain Python types."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str):
        return value
    return plain_int(value) if isinstance(value, numbers.Real) else [plain_int(item) for item in value]


def common_problems(config: AdapterConfig) -> list[str]:
    """What is wrong with the fields that all our adapters have, as sentences."""
    problems: list[str] = []
    check_count(problems, "r", config.r)
    check_positive(problems, "lora_alpha", config.lora_alpha)
    if not is_real(config.lora_dropout) or not 0.0 <= config.lora_dropout < 1.0:
        problems.append(f"lora_dropout is {config.lora_dropout!r}; it must be a number in [0, 1)")
    if not isinstance(config.fused, bool):
        problems.append(f"fused is {config.fused!r}; it must be true or false")
    biases = ("none", "all", config.bias_of_adapted)
    if config.bias not in biases:
        problems.append(f"bias is {config.bias!r}; it must be one of {', '.join(map(repr, biases))}")
    for name, pattern, check in (
        ("rank_pattern", config.rank_pattern, check_count),
        ("alpha_pattern", config.alpha_pattern, check_positive),
    ):
        for key, value in pattern.items():
            _check_regex(problems, f"{name} key", key)
            check(problems, f"{name}[{key!r}]", value)
    if isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear":
        _check_regex(problems, "target_modules", config.target_modules)
    if not config.target_modules and config.target_modules is not None and not config.target_parameters:
        problems.append(
            "target_modules is empty; name at least one linear module, or 'all-linear', or leave it out"
        )
    if isinstance(config.exclude_modules, str):
        _check_regex(problems, "exclude_modules", config.exclude_modules)
    if config.layers_pattern and config.layers_to_transform is None:
        problems.append("layers_pattern is given without layers_to_transform; give both or neither")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        problems.append(
            "layers_to_transform cannot be combined with a target_modules string; give the modules as a list, "
            "or write the layer numbers into the regular expression"
        )
    if config.ensure_weight_tying:
        problems.append("ensure_weight_tying=True is not supported; leave embeddings out of the adapter")
    return problems


def is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_count(problems: list[str], name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problems.append(f"{name} is {value!r}; it must be an integer of at least 1")


def check_positive(problems: list[str], name: str, value: Any) -> None:
    if not is_real(value) or value <= 0:
        problems.append(f"{name} is {value!r}; it must be a finite number above 0")


def _check_regex(problems: list[str], name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        problems.append(f"{name} {expression!r} is not a valid regular expression: {error}")
