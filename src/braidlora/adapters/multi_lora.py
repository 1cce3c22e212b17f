"""The multi-LoRA adapter: configuration, layer and PEFT tuner."""

from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters._layer import MultiLoraLayer
from braidlora.adapters._model import MultiLoraModel

__all__ = ["MultiLoraConfig", "MultiLoraLayer", "MultiLoraModel"]
