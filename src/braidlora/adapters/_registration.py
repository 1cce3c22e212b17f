"""Making PEFT know our adapter types.

How it runs: `braidlora/__init__` asks to be called when PEFT has been imported, and then imports the tuners, whose
modules (`_model`, `factored_lora`) register themselves at their end. Where one of the adapter modules is what
imports PEFT, it is left to finish; the tuners follow with it, or with the first public name that is used.

`peft.utils.register_peft_method` accepts only names that the closed enumeration `PeftType` holds, so the enumeration
is extended first. A plain string would not do: transformers reads `peft_type.value`.
"""

from __future__ import annotations

from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

from braidlora.adapters._peft_compat import register_peft_method

NAME = "BRAIDLORA"
PREFIX = "braidlora_"
FACTORED_NAME = "FACTOREDLORA"
FACTORED_PREFIX = "factoredlora_"


def extend_peft_type(name: str) -> PeftType:
    """The member `name` of `PeftType`, added if it is not there yet.

    It behaves like a member of the class body: iteration, lookup by name and by value, pickle, copy and JSON. Calling
    again returns the same member.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    # EnumMeta rejects assignments to the class, `type` does not.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Python 3.12 and newer answer `value in PeftType` from this list.
    hashable_values = PeftType.__dict__.get("_hashable_values_")
    if hashable_values is not None:
        hashable_values.append(name)
    return member


def register(name: str, prefix: str, config: type[Any], tuner: type[Any]) -> None:
    """Make PEFT, and with it transformers, know a configuration and its tuner by the type `name`. Idempotent."""
    if extend_peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config, model_cls=tuner, prefix=prefix)
