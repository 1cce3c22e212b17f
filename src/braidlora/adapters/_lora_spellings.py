"""`LoraConfig`'s argument names, so that changing the class name turns a LoraConfig into a configuration of ours.

Arguments with a meaning here are accepted, others are accepted at LoraConfig's default and rejected otherwise, by name
and with an alternative. Names that LoraConfig does not have either raise Python's TypeError: PEFT drops those, with a
warning, when it loads the file of a later version.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, TypeVar

from peft import LoraConfig

from braidlora.adapters.base_edits import BASE_EDITS
from braidlora.errors import ConfigError

C = TypeVar("C")

# Written into adapter_config.json for readers who meet PEFT's KeyError; ignored when loading.
NOTE = "requires"

_ALTERNATIVES = {
    "use_dora": "weight decomposition (DoRA) is not part of this layer",
    "lora_bias": "factors have no bias; to train biases of adapted layers use bias='lora_only'",
    "layer_replication": "replicate the layers first and adapt the replicated model",
    "megatron_config": "Megatron's parallel layers are not supported",
    "megatron_core": "Megatron's parallel layers are not supported",
    "loftq_config": "load the base model quantized (bitsandbytes, GPTQ, …) and adapt that",
    "eva_config": "there is no EVA initialization",
    "corda_config": "there is no CorDA initialization",
    "lora_ga_config": "there is no LoRA-GA initialization",
    "alora_invocation_tokens": "Activated LoRA is a different method; ALoRA here is the LoRA with a shared B",
    "arrow_config": "the router here is trained; see share and num_experts",
}
_INITS = {
    **dict.fromkeys(BASE_EDITS, "changes the base weights"), "eva": "needs a pass over the data",
    "orthogonal": "draws B too, so the adapted model would not start as the base model",
    "mica": "freezes B",
}  # fmt: skip


def accepts_lora_spellings(config_class: type[C]) -> type[C]:
    """Class decorator for a dataclass: its `__init__` also takes the arguments of `peft.LoraConfig`.

    Accepted: `init_lora_weights` (True, False, and "gaussian" where `init_weights` allows it), `fan_in_fan_out`, and
    every other argument of LoraConfig at LoraConfig's default.

    Raises:
        ConfigError: by the new `__init__`, with every argument that has no meaning here and an alternative.
    """
    initialize = config_class.__init__
    own = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]

    @functools.wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        kwargs.pop(NOTE, None)
        fan_in_fan_out = kwargs.pop("fan_in_fan_out", None)
        problems = _translate_init(kwargs)
        defaults = _lora_defaults()
        for name in [name for name in kwargs if name in defaults and name not in own]:
            value = kwargs.pop(name)
            if value is not None and value != defaults[name]:
                alternative = _ALTERNATIVES.get(name, "leave it out")
                problems.append(
                    f"{name}={value!r} is an option of peft.LoraConfig that is not supported here: {alternative}, or "
                    "use peft.LoraConfig"
                )
        if problems:
            raise ConfigError(f"{config_class.__name__}: " + "; ".join(problems))
        self._fan_in_fan_out = fan_in_fan_out
        initialize(self, *args, **kwargs)

    config_class.__init__ = __init__  # type: ignore[method-assign]
    return config_class


def _translate_init(kwargs: dict[str, Any]) -> list[str]:
    """Turn `init_lora_weights` into `init_weights`; return what is wrong with it."""
    if "init_lora_weights" not in kwargs:
        return []
    value = kwargs.pop("init_lora_weights")
    if isinstance(value, str):
        value = value.lower()
        reason = next((why for name, why in _INITS.items() if value.startswith(name)), None)
        if value != "gaussian":
            why = f" ({value} {reason})" if reason else ""
            return [
                f"init_lora_weights is {value!r}{why}; it must be True (B is zero), False (B is drawn too) or "
                "'gaussian'"
            ]
    if "init_weights" in kwargs and kwargs["init_weights"] != value:
        return [
            f"init_weights={kwargs['init_weights']!r} and init_lora_weights={value!r} contradict each other; "
            "they are the same setting, give one of them"
        ]
    kwargs["init_weights"] = value
    return []


@functools.cache
def _lora_defaults() -> dict[str, Any]:
    """The arguments of PEFT's LoraConfig that have a default, with their defaults."""
    defaults = {}
    for field in dataclasses.fields(LoraConfig):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def warn_of_layout(config: Any, name: str, transposed: bool) -> None:
    """Warn if `fan_in_fan_out` was given and contradicts the layer, whose layout follows from its class."""
    if config._fan_in_fan_out is not None and bool(config._fan_in_fan_out) != transposed:
        stored = "(in, out), as Conv1D stores it" if transposed else "(out, in), as nn.Linear stores it"
        warnings.warn(
            f"fan_in_fan_out is set to {config._fan_in_fan_out}, but the weight of {name!r} is {stored}. The setting "
            "is ignored: the layout follows from the layer's class.",
            stacklevel=2,
        )
