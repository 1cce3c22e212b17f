"""Teaching PEFT our adapter types.

`peft.utils.register_peft_method` is public but accepts only names that the closed enumeration `PeftType` holds,
so the enumeration is extended first. A plain string would not do: transformers reads `peft_type.value`.
"""

from __future__ import annotations

import wrapt
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "BRAIDLORA"
PREFIX = "braidlora_"
FACTORED_NAME = "FACTOREDLORA"
FACTORED_PREFIX = "factoredlora_"


def extend_peft_type(name: str) -> PeftType:
    """The member `name` of `PeftType`, added if it is not there yet.

    It behaves as if it had been written in the class body: iteration, lookup by name and by value, pickle, copy
    and JSON. Calling again returns the same member.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    # EnumMeta refuses assignments to the class, `type` does not.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Python 3.12 and newer answer `value in PeftType` from this list.
    hashable_values = PeftType.__dict__.get("_hashable_values_")
    if hashable_values is not None:
        hashable_values.append(name)
    return member


def register() -> None:
    """Make PEFT and transformers know `MultiLoraConfig` and `FactoredLoraConfig`. Idempotent."""
    from braidlora.adapters import _lorafa_guard
    from braidlora.adapters.factored_lora import FactoredLoraConfig, FactoredLoraModel
    from braidlora.adapters.multi_lora import MultiLoraConfig, MultiLoraModel

    for name, prefix, config, model in (
        (NAME, PREFIX, MultiLoraConfig, MultiLoraModel),
        (FACTORED_NAME, FACTORED_PREFIX, FactoredLoraConfig, FactoredLoraModel),
    ):
        if extend_peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=prefix)
            if name == NAME:
                wrapt.register_post_import_hook(_lorafa_guard.guard, _lorafa_guard.MODULE)
