"""braidlora: many LoRAs, one model.

Importing this package registers its PEFT types, so that `peft.PeftModel.from_pretrained` and
`transformers.AutoModel*.from_pretrained` can load braidlora adapters. The import itself is light: torch and PEFT are
imported with the first adapter class or call (`train`, `compare`, `federate`, `advise`, `analyze`, `load`), and the
types are registered as soon as anyone imports PEFT.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from braidlora.adapters import (
        FactoredLoraConfig,
        FactoredLoraLayer,
        FactoredLoraModel,
        MultiLoraConfig,
        MultiLoraLayer,
        MultiLoraModel,
    )
    from braidlora.api import advise, analyze, compare, federate, load, train

__version__ = "0.2.0.dev0"
__all__ = [
    "FactoredLoraConfig",
    "FactoredLoraLayer",
    "FactoredLoraModel",
    "MultiLoraConfig",
    "MultiLoraLayer",
    "MultiLoraModel",
    "__version__",
    "advise",
    "analyze",
    "compare",
    "federate",
    "load",
    "train",
]
_CALLS = ("advise", "analyze", "compare", "federate", "load", "train")


@wrapt.when_imported("peft")
def _import_tuners(peft: Any) -> None:
    """Import the tuners, which register their types: at once if PEFT is imported already, or right after its import.

    An adapter module that imports PEFT is only half imported at this point; see `adapters/_registration.py`.
    """
    ours = [module for name, module in sys.modules.items() if name.startswith("braidlora.adapters.")]
    if not any(getattr(module.__spec__, "_initializing", False) for module in ours):
        importlib.import_module("braidlora.adapters.multi_lora")
        importlib.import_module("braidlora.adapters.factored_lora")


def __getattr__(name: str) -> Any:
    if name in _CALLS:
        from braidlora import api

        return getattr(api, name)
    if name in __all__:
        from braidlora import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module 'braidlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
