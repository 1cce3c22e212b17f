"""Files in the package: the embedded base model and model dimensions for planning."""

from __future__ import annotations

from pathlib import Path


def embedded_base_path() -> Path:
    """Folder of the embedded base model: a Llama-class model with one million parameters, and its tokenizer.

    `AutoModelForCausalLM` and `AutoTokenizer` load it offline. `scripts/train_embedded_base.py` created it.
    """
    return Path(__file__).parent / "base"
