"""The section of an adapter folder's README.md that says how to load it.

Without `import braidlora`, PEFT raises `KeyError: 'BRAIDLORA'`. It has no plug-ins and reads nothing else before, so
the folder itself has to say what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braidlora.adapters._registration import FACTORED_NAME, NAME

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
    path.write_text(f"{head}\n{_MARK}\n## How to load\n\n{how_to_load(config)}\n{body}", encoding="utf-8")


def needs_import(config: dict[str, Any]) -> bool:
    """Whether PEFT knows the type of an adapter only after `import braidlora`.

    Args:
        config: its adapter_config.json.
    """
    return config.get("peft_type") in (NAME, FACTORED_NAME)


def how_to_load(config: dict[str, Any]) -> str:
    """The code that loads an adapter, and for types of ours the error without `import braidlora`.

    Args:
        config: its adapter_config.json.
    """
    task = config.get("task_type") or ""
    kind = _CLASSES.get(task, "AutoModel")
    base = config.get("base_model_name_or_path") or "BASE_MODEL"
    labels = ", num_labels=NUMBER_OF_LABELS" if task == "SEQ_CLS" else ""
    importing, note = "", ""
    if needs_import(config):
        importing = "import braidlora  # pip install braidlora; registers this adapter's type with PEFT\n"
        note = (
            f"\nWithout `import braidlora`, loading raises `KeyError: '{config['peft_type']}'`, because PEFT does "
            "not know this type.\n"
        )
    return (
        f"```python\n{importing}from peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{base}"{labels})\n'
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")\n'
        f"```\n{note}"
    )


def _new_card(config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return "---\n" + (f"base_model: {base}\n" if base else "") + "library_name: peft\n---\n"


def _split_metadata(card: str) -> tuple[str, str]:
    """The YAML block at the top of a card, including its closing line, and the rest."""
    if card.startswith("---\n") and (end := card.find("\n---\n", 3)) >= 0:
        return card[: end + 5], card[end + 5 :]
    return "", card
