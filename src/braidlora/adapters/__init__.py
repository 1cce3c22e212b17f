"""LoRA adapters that share a factor, as PEFT tuners: torch and PEFT only.

`sharing` and `base_edits` import neither; all other names are imported, with PEFT, when they are first used. Every
other room but `config` and `runs` may call this one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braidlora.adapters._balance import balance_scopes, claim_balance_loss, with_balance_loss
    from braidlora.adapters._card import how_to_load, needs_import
    from braidlora.adapters._experts import MultiLoraExperts, MultiLoraParameter, stacked_parameters
    from braidlora.adapters._hotswap import hotswap_adapter
    from braidlora.adapters._scaling import rescale_adapter_scale, scaled_layers
    from braidlora.adapters._tasks import for_tasks
    from braidlora.adapters.alignment import alignment_loss, collecting
    from braidlora.adapters.factored_lora import (
        FactoredLoraConfig,
        FactoredLoraLayer,
        FactoredLoraModel,
        factored_to_lora,
    )
    from braidlora.adapters.functional import static_factors
    from braidlora.adapters.multi_lora import MultiLoraConfig, MultiLoraLayer, MultiLoraModel, multi_to_lora

__all__ = [
    "FactoredLoraConfig",
    "FactoredLoraLayer",
    "FactoredLoraModel",
    "MultiLoraConfig",
    "MultiLoraExperts",
    "MultiLoraLayer",
    "MultiLoraModel",
    "MultiLoraParameter",
    "alignment_loss",
    "balance_scopes",
    "claim_balance_loss",
    "collecting",
    "factored_to_lora",
    "for_tasks",
    "hotswap_adapter",
    "how_to_load",
    "multi_to_lora",
    "needs_import",
    "rescale_adapter_scale",
    "scaled_layers",
    "stacked_parameters",
    "static_factors",
    "with_balance_loss",
]


# Where they are defined; the first two register our types with PEFT.
_HOMES = (
    "multi_lora factored_lora functional _experts _balance _card _hotswap _scaling _tasks alignment".split()
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'braidlora.adapters' has no attribute {name!r}")
    # First: its import imports the tuners before any of our modules is half imported.
    importlib.import_module("peft")
    modules = [importlib.import_module(f"braidlora.adapters.{home}") for home in _HOMES]
    globals()[name] = value = next(getattr(module, name) for module in modules if hasattr(module, name))
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
