"""Why a base model could not be loaded, as messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from braidlora.errors import BraidloraError, ConfigError, TrainingError, is_out_of_memory
from braidlora.paths import places_searched


def load_failed(given: str, path: str, error: Exception) -> ConfigError:
    """The error for a base that transformers cannot load; `given` is the recipe's path, `path` the resolved one."""
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return ConfigError(
            f"model.path: {given} needs code that comes with the model, and braidlora never runs such code. "
            "Choose a base whose class transformers has."
        )
    first = text.strip().split("\n")[0]
    if "safetensors" in text and "no file named" in text.lower():
        first += " Only safetensors is read; pickled weights are rejected."
    elif not Path(path).is_dir():
        first += f" There is no such folder ({places_searched(given)}), and the hub did not provide it."
    return ConfigError(f"model.path: {given} cannot be loaded: {first}")


@contextmanager
def explain_out_of_memory(given: str) -> Iterator[None]:
    """Turn running out of memory while `given` is loaded into a TrainingError."""
    try:
        yield
    except BraidloraError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise TrainingError(
            f"model.path: out of memory while loading {given} ({first[:200]}). Free memory, load it in half the "
            "bytes with model.dtype=bfloat16, set model.quantization=8bit or 4bit on a GPU, or choose a smaller base."
        ) from error
