"""braidlora: many LoRAs, one model.

Importing this package registers its PEFT types, so that `peft.PeftModel.from_pretrained` and
`transformers.AutoModel*.from_pretrained` can load braidlora adapters. The import itself is light: torch and peft are
imported only when an adapter class is used; registration waits until `peft` is imported.
"""

from __future__ import annotations

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

__version__ = "0.2.0.dev0"
__all__ = [
    "FactoredLoraConfig",
    "FactoredLoraLayer",
    "FactoredLoraModel",
    "MultiLoraConfig",
    "MultiLoraLayer",
    "MultiLoraModel",
    "__version__",
]


@wrapt.when_imported("peft")
def _register(peft: Any) -> None:
    # Runs immediately if peft is already imported, and otherwise right after its import.
    from braidlora.adapters._register import register

    register()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from braidlora import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module 'braidlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
