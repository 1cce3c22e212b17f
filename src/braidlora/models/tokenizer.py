"""The tokenizer of a base model, and its padding."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from braidlora.config import ModelSection
from braidlora.errors import ConfigError, first_line
from braidlora.hub_access import check_hub
from braidlora.models.hub_copies import is_hub_name
from braidlora.models.location import base_source
from braidlora.paths import find_data, places_searched

_LONGEST_TEMPLATE = 1 << 20  # characters, as in an adapter's card


def load_tokenizer(section: ModelSection) -> Any:
    """The base's tokenizer alone.

    Raises:
        ConfigError: there is no such model, or it has no tokenizer.
    """
    path = base_source(section)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        if is_hub_name(path) and not find_data(path).is_dir() and not check_hub():
            raise ConfigError(
                f"model.path: {path}: its tokenizer is not in the hub's cache, and the hub cannot be reached (or "
                "HF_HUB_OFFLINE is set). Connect to it, or download the model on another machine "
                f"(`hf download {path} --local-dir FOLDER`) and set model.path=FOLDER."
            ) from error
        raise ConfigError(
            f"model.path: the tokenizer of {section.path} cannot be loaded: {first_line(error)}"
        ) from error
    set_chat_template(section, tokenizer)
    return tokenizer


def set_chat_template(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the recipe's own chat template, if there is one.

    Raises:
        ConfigError: the file cannot be read, or is not a Jinja template.
    """
    if section.chat_template is None:
        return
    path = find_data(section.chat_template)
    try:
        text = path.read_bytes()[: _LONGEST_TEMPLATE + 1].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"model.chat_template: {section.chat_template}: cannot be read: {reason}; expected a file with a Jinja "
            f"template ({places_searched(section.chat_template)})."
        ) from None
    if not text.strip() or len(text) > _LONGEST_TEMPLATE:
        size = "is empty" if not text.strip() else f"has more than {_LONGEST_TEMPLATE:,} characters"
        raise ConfigError(f"model.chat_template: {section.chat_template}: {size}; expected a Jinja template.")
    if "messages" not in text:
        raise ConfigError(
            f"model.chat_template: {section.chat_template}: is not a chat template; it does not use `messages`."
        )
    tokenizer.chat_template = text


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
