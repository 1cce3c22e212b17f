"""LoRA adapters that share a factor, as PEFT tuners."""

# First, so that the registration hook of `braidlora/__init__.py` runs before any of our modules is half imported.
import peft  # noqa: F401  isort: skip

from braidlora.adapters._experts import stacked_parameters
from braidlora.adapters.factored_lora import (
    FactoredLoraConfig,
    FactoredLoraLayer,
    FactoredLoraModel,
    factored_to_lora,
)
from braidlora.adapters.multi_lora import (
    MultiLoraConfig,
    MultiLoraLayer,
    MultiLoraModel,
    multi_to_lora,
    static_factors,
)

__all__ = [
    "FactoredLoraConfig",
    "FactoredLoraLayer",
    "FactoredLoraModel",
    "MultiLoraConfig",
    "MultiLoraLayer",
    "MultiLoraModel",
    "factored_to_lora",
    "multi_to_lora",
    "stacked_parameters",
    "static_factors",
]
