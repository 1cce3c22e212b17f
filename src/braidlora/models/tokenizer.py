"""The tokenizer of a base model, and its padding."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from braidlora.config import ModelSection
from braidlora.errors import ConfigError, first_line
from braidlora.models.location import base_source


def load_tokenizer(section: ModelSection) -> Any:
    """The base's tokenizer alone.

    Raises:
        ConfigError: there is no such model, or it has no tokenizer.
    """
    path = base_source(section)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            path, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(
            f"model.path: the tokenizer of {section.path} cannot be loaded: {first_line(error)}"
        ) from error


def choose_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the tokenizer's own padding token; without one use unk, which is rare in texts, else EOS.

    No token is added. Padding is masked and carries no loss, so the choice matters only to classifiers on decoders,
    which find the last token of a row by it.

    Raises:
        ConfigError: the tokenizer has none of these tokens.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            "model.path: the tokenizer has neither a padding, an unknown nor an end token to pad with. Give it one "
            "(tokenizer.pad_token = …, save_pretrained) and load that folder."
        )
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
