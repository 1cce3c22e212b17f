"""What our PEFT configurations have in common: numbers as plain Python has them, and files that say how to load."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from braidlora.adapters._card import add_loading_section
from braidlora.adapters._lora_spellings import NOTE


@dataclass
class OwnConfig(PeftConfig):
    """Base of our configurations."""

    counts: ClassVar[tuple[str, ...]] = ("r",)
    reals: ClassVar[tuple[str, ...]] = ("lora_alpha", "lora_dropout")
    bias_of_adapted: ClassVar[str]
    _fan_in_fan_out: ClassVar[bool | None] = None

    @property
    def init_lora_weights(self) -> Any:
        """LoRA's name of `init_weights`, for code that reads it."""
        return self.__dict__["init_weights"]

    @init_lora_weights.setter
    def init_lora_weights(self, value: Any) -> None:
        self.__dict__["init_weights"] = value

    def normalise(self) -> None:
        """Plain numbers, lists and sets where NumPy's or other iterables were given; LoRA's name of a bias setting."""
        for name in self.counts:
            setattr(self, name, whole(getattr(self, name)))
        for name in self.reals:
            setattr(self, name, real(getattr(self, name)))
        config: Any = self
        config.rank_pattern = {key: whole(rank) for key, rank in dict(config.rank_pattern or {}).items()}
        config.alpha_pattern = {key: real(alpha) for key, alpha in dict(config.alpha_pattern or {}).items()}
        if config.bias == "lora_only":
            config.bias = self.bias_of_adapted
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(value))
        if isinstance(config.target_parameters, (tuple, set)):
            config.target_parameters = sorted(config.target_parameters)
        if config.modules_to_save is not None:
            config.modules_to_save = list(config.modules_to_save)  # PEFT extends it for classifiers
        config.layers_to_transform = _plain(config.layers_to_transform)
        config.trainable_token_indices = _plain(config.trainable_token_indices)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with a note for whoever opens it, and how to load the adapter into README.md."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_NAME
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved[NOTE] = "pip install braidlora; then `import braidlora` before PEFT loads this adapter"
        path.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")
        add_loading_section(Path(save_directory), saved)


def whole(value: Any) -> Any:
    """8, numpy.int64(8) and 8.0 as 8; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(float(value)) if float(value).is_integer() else value


def real(value: Any) -> Any:
    """A number of any library as Python's int or float; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _plain(value: Any) -> Any:
    """Integers, lists of them, and mappings to such lists, as plain Python has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str):
        return value
    return whole(value) if isinstance(value, numbers.Real) else [whole(item) for item in value]
