"""LoRA adapters that share a factor, as PEFT tuners."""

# First, so that the registration hook of `braidlora/__init__.py` runs before any of our modules is half imported.
import peft  # noqa: F401  isort: skip

from braidlora.adapters.multi_lora import MultiLoraConfig, MultiLoraLayer, MultiLoraModel

__all__ = ["MultiLoraConfig", "MultiLoraLayer", "MultiLoraModel"]
