"""What the tests of chats share: conversations of every shape, and tokenizers for a template."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from task_helpers import byte_level_tokenizer

from braidlora.config import PromptSection
from braidlora.tasks import IGNORED, Encoded, encode_examples, get_template

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Looks out of the window",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "a city"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SINGLE = [user("askone"), assistant("replyone")]
MULTI = [*SINGLE, user("asktwo"), assistant("replytwo"), user("askthree"), assistant("replythree")]
SYSTEM = [{"role": "system", "content": "besystem"}, *MULTI]
CALLING = [
    user("askone"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "gotrain"},
    assistant("replyone"),
]
THINKING = [
    user("askone"),
    assistant("<think>\nthoughtone\n</think>\n\nreplyone"),
    user("asktwo"),
    assistant("<think>\nthoughttwo\n</think>\n\nreplytwo"),
]
ROWS: dict[str, dict[str, Any]] = {
    "single": {"messages": SINGLE},
    "multi": {"messages": MULTI},
    "system": {"messages": SYSTEM},
    "calling": {"messages": CALLING, "tools": TOOLS},
    "thinking": {"messages": THINKING},
}


@functools.cache
def tokenizer_for(template: str, eos: str = "<|end|>") -> Any:
    """A byte-level tokenizer whose special tokens are the markers in a template."""
    tokenizer = byte_level_tokenizer()
    markers = sorted(set(re.findall(r"<[^\s<>'\"{}]{2,40}>|\[/?[A-Z_]{3,20}\]", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": [one for one in markers if one != eos]})
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": eos})
    tokenizer.chat_template = template
    return tokenizer


def encoded(row: dict[str, Any], tokenizer: Any, **prompt: Any) -> list[Any]:
    section = PromptSection(**{"template": "chat", "cutoff": 4096, **prompt})
    return encode_examples([json.loads(json.dumps(row))], get_template("chat"), tokenizer, section)


def runs(one: Encoded) -> list[tuple[int, int]]:
    """The (start, end) tokens with loss."""
    with_loss = [False, *(label != IGNORED for label in one.labels), False]
    places = [at for at in range(len(with_loss) - 1) if with_loss[at] != with_loss[at + 1]]
    return list(zip(places[::2], places[1::2], strict=True))


def learned(one: Encoded, tokenizer: Any) -> list[str]:
    """The texts with loss."""
    return [tokenizer.decode(one.input_ids[start:end]) for start, end in runs(one)]
