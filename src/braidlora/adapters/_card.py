"""The section of an adapter folder's README.md that says how to load it.

Without `import braidlora`, PEFT raises `KeyError: 'BRAIDLORA'`. It has no plug-ins and reads nothing else before, so
the folder itself has to say what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CARD = "README.md"
_MARK = "<!-- braidlora: how to load -->"
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def add_loading_section(folder: Path, config: dict[str, Any]) -> None:
    """Add the section to the model card that PEFT wrote, or write a card if there is none; once per card.

    Args:
        folder: that of the adapter.
        config: its adapter_config.json.
    """
    path = folder / _CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else _new_card(config)
    if _MARK in card:
        return
    head, body = _split_metadata(card)
    path.write_text(f"{head}{loading_section(config)}\n{body}", encoding="utf-8")


def loading_section(config: dict[str, Any]) -> str:
    """How to import and load, and the error without `import braidlora`."""
    kind = _CLASSES.get(config.get("task_type") or "", "AutoModel")
    base = config.get("base_model_name_or_path") or "BASE_MODEL"
    return (
        f"\n{_MARK}\n## How to load\n\n```python\n"
        "import braidlora  # pip install braidlora; registers this adapter's type with PEFT\n"
        "from peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")\n'
        "```\n\n"
        f"Without `import braidlora`, loading raises `KeyError: '{config['peft_type']}'`, an unknown type.\n"
    )


def _new_card(config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return "---\n" + (f"base_model: {base}\n" if base else "") + "library_name: peft\n---\n"


def _split_metadata(card: str) -> tuple[str, str]:
    """The YAML block at the top of a card, including its closing line, and the rest."""
    if card.startswith("---\n") and (end := card.find("\n---\n", 3)) >= 0:
        return card[: end + 5], card[end + 5 :]
    return "", card
