"""LoRA adapters that share a factor, as PEFT tuners: torch and PEFT only.

`sharing` and `base_edits` import neither; all other names are imported, with PEFT, when they are first used. Every
other room but `config` and `runs` may call this one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braidlora.adapters._balance import balance_scopes, claim_balance_loss, with_balance_loss
    from braidlora.adapters._card import how_to_load
    from braidlora.adapters._experts import MultiLoraExperts, MultiLoraParameter, stacked_parameters
    from braidlora.adapters._hotswap import hotswap_adapter
    from braidlora.adapters._scaling import rescale_adapter_scale, scaled_layers
    from braidlora.adapters.factored_lora import (
        FactoredLoraConfig,
        FactoredLoraLayer,
        FactoredLoraModel,
        factored_to_lora,
    )
    from braidlora.adapters.functional import static_factors
    from braidlora.adapters.multi_lora import (
        MultiLoraConfig,
        MultiLoraLayer,
        MultiLoraModel,
        multi_to_lora,
    )

_HOMES = {
    "FactoredLoraConfig": "factored_lora",
    "FactoredLoraLayer": "factored_lora",
    "FactoredLoraModel": "factored_lora",
    "MultiLoraConfig": "multi_lora",
    "MultiLoraExperts": "_experts",
    "MultiLoraLayer": "multi_lora",
    "MultiLoraModel": "multi_lora",
    "MultiLoraParameter": "_experts",
    "balance_scopes": "_balance",
    "claim_balance_loss": "_balance",
    "factored_to_lora": "factored_lora",
    "hotswap_adapter": "_hotswap",
    "how_to_load": "_card",
    "multi_to_lora": "multi_lora",
    "rescale_adapter_scale": "_scaling",
    "scaled_layers": "_scaling",
    "stacked_parameters": "_experts",
    "static_factors": "functional",
    "with_balance_loss": "_balance",
}
__all__ = [
    "FactoredLoraConfig",
    "FactoredLoraLayer",
    "FactoredLoraModel",
    "MultiLoraConfig",
    "MultiLoraExperts",
    "MultiLoraLayer",
    "MultiLoraModel",
    "MultiLoraParameter",
    "balance_scopes",
    "claim_balance_loss",
    "factored_to_lora",
    "hotswap_adapter",
    "how_to_load",
    "multi_to_lora",
    "rescale_adapter_scale",
    "scaled_layers",
    "stacked_parameters",
    "static_factors",
    "with_balance_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'braidlora.adapters' has no attribute {name!r}")
    importlib.import_module(
        "peft"
    )  # first: its import imports the tuners before any of our modules is half imported
    for home in ("multi_lora", "factored_lora", _HOMES[name]):
        module = importlib.import_module(f"braidlora.adapters.{home}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
