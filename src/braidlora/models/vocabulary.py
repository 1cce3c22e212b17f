"""A tokenizer with more tokens than its base's embedding has rows."""

from __future__ import annotations

from typing import Any

from braidlora.errors import ConfigError


def check_vocabulary(given: str, model: Any, tokenizer: Any) -> None:
    """Reject a tokenizer whose own vocabulary does not fit; watch for added tokens that do not.

    Some bases (Gemma 3 270M) have an added token without a row, which text never contains: such a token is rejected
    when it occurs in a batch.

    Args:
        given: the recipe's model.path.
        model: the base.
        tokenizer: its tokenizer.

    Raises:
        ConfigError: the tokenizer's vocabulary without added tokens is larger than the embedding.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or len(tokenizer) <= (rows := embedding.num_embeddings):
        return
    if tokenizer.vocab_size > rows:
        raise _too_large(given, tokenizer, rows, "")

    def refuse_tokens(module: Any, inputs: tuple[Any, ...]) -> None:
        (ids,) = inputs[:1]
        if int(ids.max()) >= rows:
            token = tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise _too_large(given, tokenizer, rows, f" The rows contain {token!r}, token {int(ids.max())}.")

    embedding.register_forward_pre_hook(refuse_tokens)


def _too_large(given: str, tokenizer: Any, rows: int, what: str) -> ConfigError:
    return ConfigError(
        f"model.path: {given}: its tokenizer has {len(tokenizer):,} tokens, but its embedding has {rows:,} rows, so "
        f"tokens from {rows:,} on have no vector.{what} Use the tokenizer that the base was trained with, or resize "
        "the embedding (model.resize_token_embeddings(len(tokenizer))) and save both."
    )
