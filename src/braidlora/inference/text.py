"""From prompts to token ids, and their continuations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.errors import ConfigError, DataError
from braidlora.evaluation import predict
from braidlora.inference.sampling import Sampling
from braidlora.models.base import positions_of
from braidlora.tasks import Template, encode_prompt, get_template
from braidlora.tasks._task import BadRow
from braidlora.tasks.encode import bos_tokens
from braidlora.tasks.messages import COLUMNS, read_chat

_CHAT = get_template("chat")


def encode_prompts(
    prompts: Sequence[Any], template: Template | None, model: Any, tokenizer: Any, cutoff: int, room: int
) -> list[list[int]]:
    """The token ids of each prompt.

    A prompt in a template loses tokens at its start beyond `cutoff`, as in training; any other must fit.

    Args:
        template: for texts and rows; None takes a text as it is.
        room: tokens of the answer, which must fit behind the prompt.

    Raises:
        ConfigError: the answer alone exceeds the model's positions, or a prompt leaves it no room.
        DataError: a prompt is not a text, a row, or a chat.
    """
    positions = positions_of(model)
    if positions is not None and room >= positions:
        raise ConfigError(
            f"--max-new-tokens: {room} tokens leave no room for a prompt; the model has {positions} positions."
        )
    most = None if positions is None else positions - room
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        if is_chat(prompt):
            chat = template if template is not None and template.chat else _CHAT
            ids = _rendered(_chat(prompt, number), chat, tokenizer, number)
        elif template is not None:
            row = _row(prompt, number)
            encoded.append(encode_prompt(row, template, tokenizer, min(cutoff, most or cutoff)))
            continue
        else:
            ids = _plain(prompt, number, tokenizer)
        if most is not None and len(ids) > most:
            raise ConfigError(
                f"prompt {number}: has {len(ids)} tokens, and with {room} of the answer exceeds the model's "
                f"{positions} positions. Shorten it, or lower --max-new-tokens."
            )
        encoded.append(ids)
    return encoded


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, or a mapping that has one."""
    if isinstance(prompt, Mapping):
        return any(prompt.get(name) is not None for name in COLUMNS)
    return not isinstance(prompt, str)


def _chat(prompt: Any, number: int) -> dict[str, Any]:
    """The row of a chat."""
    columns = prompt if isinstance(prompt, Mapping) else {"messages": prompt}
    column = next(name for name in COLUMNS if columns.get(name) is not None)
    try:
        row = read_chat(columns, column)
    except BadRow as problem:
        raise DataError(f"prompt {number}: {problem}.") from None
    if row["messages"][-1]["role"] == "assistant":
        raise DataError(
            f"prompt {number}: the chat ends with the assistant's message, so there is nothing to answer; leave it out."
        )
    return row


def _rendered(row: Mapping[str, Any], template: Template, tokenizer: Any, number: int) -> list[int]:
    try:
        text = template.prompt(row, tokenizer, evaluation=True)
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from None
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _row(prompt: str | Mapping[str, Any], number: int) -> dict[str, str]:
    if isinstance(prompt, str):
        return {"instruction": prompt, "input": ""}
    row = {name: prompt.get(name) or "" for name in ("instruction", "input")}
    if not all(isinstance(value, str) for value in row.values()) or not "".join(row.values()).strip():
        there = ", ".join(map(str, prompt)) or "nothing"
        raise DataError(f"prompt {number}: needs a text `instruction` or `input`; it has {there}.")
    return row


def _plain(prompt: Any, number: int, tokenizer: Any) -> list[int]:
    if isinstance(prompt, Mapping):
        row = _row(prompt, number)
        prompt = row["instruction"] + row["input"]
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return [*bos_tokens(tokenizer), *ids] or [tokenizer.eos_token_id]


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
    streamer: Any = None,
) -> list[str]:
    """The continuation of every prompt, in order. The seed's draws leave torch's global generator as it was."""
    import torch

    assert sampling.max_new_tokens is not None
    texts = [""] * len(prompts)
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(sampling.seed)
        for index, text in predict.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            batch_size=1 if streamer is not None else batch_size,
            sampling=sampling.settings(),
            stop=sampling.stop,
            streamer=streamer,
        ):
            texts[index] = text
    return texts
