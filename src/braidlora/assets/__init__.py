"""Files that ship in the package: the embedded base model."""

from __future__ import annotations

from pathlib import Path


def embedded_base_path() -> Path:
    """The folder of the embedded base: a Llama-class model of one million parameters with its tokenizer.

    `AutoModelForCausalLM` and `AutoTokenizer` load it without a network. `scripts/train_embedded_base.py` made it.
    """
    return Path(__file__).parent / "base"
