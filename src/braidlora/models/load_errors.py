"""Why a base model could not be loaded, as messages."""

from __future__ import annotations

from pathlib import Path

from braidlora.errors import ConfigError, first_line
from braidlora.paths import places_searched


def load_failed(given: str, path: str, error: Exception) -> ConfigError:
    """The error for a base that transformers cannot load; `given` is the recipe's path, `path` the resolved one."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return ConfigError(
            f"model.path: {given} needs code that comes with the model, and braidlora never runs such code. "
            "Choose a base whose class transformers has."
        )
    first = first_line(error)
    if "safetensors" in text and "no file named" in text.lower():
        first += " Only safetensors is read; pickled weights are rejected."
    elif not Path(path).is_dir():
        first += f" There is no such folder ({places_searched(given)}), and the hub did not provide it."
    return ConfigError(f"model.path: {given} cannot be loaded: {first}")
