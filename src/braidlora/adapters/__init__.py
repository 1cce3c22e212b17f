"""LoRA adapters that share a factor, as PEFT tuners."""

# First, so that the registration hook of `braidlora/__init__.py` runs before any of our modules is half imported.
import peft  # noqa: F401  isort: skip

from braidlora.adapters._balance import with_balance_loss
from braidlora.adapters._experts import MultiLoraExperts, MultiLoraParameter, stacked_parameters
from braidlora.adapters._hotswap import hotswap_adapter
from braidlora.adapters._parts import rescale_adapter_scale, scaled_layers
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
    "MultiLoraExperts",
    "MultiLoraLayer",
    "MultiLoraModel",
    "MultiLoraParameter",
    "factored_to_lora",
    "hotswap_adapter",
    "multi_to_lora",
    "rescale_adapter_scale",
    "scaled_layers",
    "stacked_parameters",
    "static_factors",
    "with_balance_loss",
]
