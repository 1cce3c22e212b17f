"""Chats under a tokenizer's own template: the text of a chat, its prompt, and which characters the assistant wrote.

A template is a program: it may insert a system prompt, trim, drop the thinking of earlier turns, or ignore tools. So
nothing is assumed of it. An assistant turn is what the template writes after the generation prompt:

    render(messages up to the turn, add_generation_prompt=True)                      what generation starts from
    ├──────────────────────────────────────────────────────────┤
    <|user|> Hi <|end|> <|assistant|>                            Hello! <|end|>  \\n <|user|> …
    ├──────────────────────────────────────────────────────────┼──────────────┤
    render(messages with the turn)                              this turn: loss   without trailing whitespace

If the text of the entire chat does not begin with both renderings, the turn in the chat is not what the model would
write there. Then it is trained in a text of its own, which ends with the turn; where even this text does not begin with
its generation prompt, the chat is rejected. A template with `{% generation %}` marks says itself what the
assistant wrote; its marks are used instead.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from braidlora.errors import ConfigError, is_out_of_memory

Messages = Sequence[Mapping[str, Any]]
Trained = tuple[str, list[tuple[int, int]]]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = re.compile(r"</?think>")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REMEDY = (
    "Set the template's variables (prompt.chat_template_kwargs, e.g. enable_thinking), or give a template for "
    "training: model.chat_template=FILE.jinja."
)
_MOST_PROBED = 10_000
_probed: set[str] = set()


class ChatProblem(Exception):  # noqa: N818 (internal: becomes a DataError or a count)
    """Why a chat cannot be rendered exactly under this template."""


@dataclass(frozen=True)
class Chat:
    """The chat of a row, and how its template is called.

    Attributes:
        messages: of the row, or its instruction and output as a user's and an assistant's message.
        tools: JSON schemas; None if there are none.
        variables: for the template, `prompt.chat_template_kwargs`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], variables: Mapping[str, Any]) -> Chat:
        """Of a row of any `generate` task."""
        if "messages" in row:
            return cls(list(row["messages"]), row.get("tools"), variables)
        content = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        messages = [{"role": "user", "content": content}]
        if "output" in row:
            messages.append({"role": "assistant", "content": row["output"]})
        return cls(messages, None, variables)

    @property
    def question(self) -> list[dict[str, Any]]:
        """The messages that the last answer answers."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    def prompt(self, tokenizer: Any) -> str:
        """The text that generation of the last answer starts from.

        Raises:
            ChatProblem: the template rejects the messages, or leaves something out.
            ConfigError: the tokenizer has no chat template.
        """
        text = self.render(tokenizer, self.question, add_generation_prompt=True)
        self._probe(tokenizer, self.question, text)
        return text

    def render(self, tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of some messages under the template, which transformers runs in a sandbox.

        Raises:
            ChatProblem: the template rejects these messages.
            ConfigError: the tokenizer has no chat template.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ConfigError(
                f"prompt.template: `chat` needs a chat template, and the tokenizer of {name} has none. Use an "
                "instruction-tuned base, give a template with model.chat_template=FILE.jinja, or use another prompt "
                "template such as `alpaca`."
            )

        def rendered(plain: list[dict[str, Any]]) -> str:
            return str(
                tokenizer.apply_chat_template(
                    plain,
                    tools=self.tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self.variables,
                )
            )

        return _attempted(rendered, messages)

    def sequences(self, tokenizer: Any, train_on: Literal["all", "last"]) -> list[Trained]:
        """What to train on: texts, each with the (start, end) characters of the assistant turns that have loss.

        Usually one text, the entire chat. An earlier turn that the template renders otherwise once more messages follow
        (thinking that it drops, another end-of-turn marker) is trained in a text of its own that ends with this turn.

        Raises:
            ChatProblem: the template rejects the chat, leaves something out, or does not continue its own generation
                prompt.
            ConfigError: the tokenizer has no chat template.
        """
        last = len(self.messages) - 1
        wanted = [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant"
            and message.get("weight", 1) != 0
            and (train_on == "all" or index == last)
        ]
        if not wanted:
            raise ChatProblem(
                "no assistant turn contributes to the loss: those of this chat have `weight: 0`"
            )
        text = self.render(tokenizer, self.messages)
        self._probe(tokenizer, self.messages, text)
        marks = _marked(tokenizer, self, text)
        found: list[Trained] = []
        together: list[tuple[int, int]] = []
        for index in wanted:
            try:
                if marks is None:
                    together.append(self._turn(tokenizer, text, index))
                else:
                    together += self._marked_turn(tokenizer, text, marks, index)
            except ChatProblem:
                if index == last:
                    raise
                alone = Chat(self.messages[: index + 1], self.tools, self.variables)
                found += alone.sequences(tokenizer, "last")
        return [*found, (text, together)] if together else found

    def _start(self, tokenizer: Any, text: str, index: int) -> int:
        """Where the answer begins that message `index` is."""
        before = self.render(tokenizer, self.messages[:index], add_generation_prompt=True)
        if not text.startswith(before):
            raise ChatProblem(
                f"the chat template's generation prompt for message {index} differs from how it renders this message: "
                f"{_difference(before, text)}. {_REMEDY}"
            )
        return len(before)

    def _turn(self, tokenizer: Any, text: str, index: int) -> tuple[int, int]:
        """The characters of message `index`, from the end of the generation prompt to the end-of-turn marker."""
        start = self._start(tokenizer, text, index)
        until = text
        if index < len(self.messages) - 1:
            until = self.render(tokenizer, self.messages[: index + 1])
            eos = getattr(tokenizer, "eos_token", None)
            if eos and not text.startswith(until):
                until = until.removesuffix(eos)  # some templates end a chat, but no turn within it, with EOS
            if not text.startswith(until):
                raise ChatProblem("the turn is rendered differently when it is the last one")
        # Whitespace after the end-of-turn marker is the template's: generation stops at the marker.
        written = until[start:].rstrip()
        self._check_complete(index, written)
        return start, start + len(written)

    def _marked_turn(
        self, tokenizer: Any, text: str, marks: Sequence[tuple[int, int]], index: int
    ) -> list[tuple[int, int]]:
        """The parts of message `index` that the template marks."""
        start = self._start(tokenizer, text, index)
        own = [at for at, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(marks) == len(own):
            found = [marks[own.index(index)]]
        else:
            later = [at for at in own if at > index]
            end = self._start(tokenizer, text, later[0]) if later else len(text)
            found = [mark for mark in marks if start < mark[1] <= end]
        self._check_complete(index, "".join(text[slice(*mark)] for mark in found))
        return found

    def _check_complete(self, index: int, written: str) -> None:
        """Raise if the template leaves out a part of a turn that is to be learned."""
        message = self.messages[index]
        parts = [("content", part) for part in _THINKING.split(str(message.get("content") or ""))]
        parts += [("tool call", call["function"]["name"]) for call in message.get("tool_calls") or []]
        parts += [(key, message[key]) for key in _REASONING if isinstance(message.get(key), str)]
        for what, part in parts:
            if part.strip() not in written:
                raise ChatProblem(
                    f"the chat template leaves out or changes the {what} {_short(part.strip())} of message {index}, so "
                    f"the model would not learn it. {_REMEDY}"
                )

    def _probe(self, tokenizer: Any, messages: Messages, text: str) -> None:
        """Raise if the template ignores the tools, or the messages of a role.

        Whether it does depends on the roles, not on the words, so one chat with a unique word for each message answers
        for all chats with these roles.
        """
        for tool in self.tools or []:
            if tool["function"]["name"] not in text:
                raise ChatProblem(
                    f"the chat template leaves out the tool {_short(tool['function']['name'])}; it seems to ignore "
                    "`tools`. Use a base whose template knows tools, or another template "
                    "(model.chat_template=FILE.jinja)."
                )
        shape = [[message["role"], sorted(message)] for message in messages]
        template = tokenizer.get_chat_template(tools=self.tools)
        key = json.dumps([template, dict(self.variables), bool(self.tools), shape], sort_keys=True)
        if key in _probed:
            return
        words = {
            index: f"probe{index}word" for index, message in enumerate(messages) if message.get("content")
        }
        probes = [
            {**message, "content": words[index]} if index in words else message
            for index, message in enumerate(messages)
        ]
        rendered = self.render(tokenizer, probes)
        for index, word in words.items():
            if word not in rendered:
                raise ChatProblem(
                    f"the chat template leaves out message {index}, the {messages[index]['role']}'s. Remove it from "
                    "the data, or use a template that knows this role (model.chat_template=FILE.jinja)."
                )
        if len(_probed) >= _MOST_PROBED:
            _probed.clear()
        _probed.add(key)


def has_marks(tokenizer: Any) -> bool:
    """Whether the template says itself what the assistant wrote, with `{% generation %}`."""
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else [template]
    return any(isinstance(text, str) and _MARKS.search(text) for text in texts)


def _marked(tokenizer: Any, chat: Chat, text: str) -> list[tuple[int, int]] | None:
    """The characters that the template marks as generated, in order; None if it has no marks."""
    template = tokenizer.get_chat_template(tools=chat.tools)
    if not _MARKS.search(template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    def rendered(plain: list[dict[str, Any]]) -> Any:
        # What apply_chat_template(return_assistant_tokens_mask=True) calls; it gives characters instead of tokens.
        return render_jinja_template(
            conversations=[plain],
            tools=chat.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **chat.variables},
        )

    texts, marks = _attempted(rendered, chat.messages)
    assert texts[0] == text
    return [(start, end) for start, end in marks[0] if end > start]


def _attempted(rendered: Callable[[list[dict[str, Any]]], Any], messages: Messages) -> Any:
    """The rendering of messages, with the arguments of tool calls as objects, or as JSON text if the template fails.

    Most templates expect objects; DeepSeek's concatenate a text.
    """
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        return rendered(plain)
    except Exception as error:  # a template raises whatever it likes
        if is_out_of_memory(error):
            raise
        tools = any("tool_calls" in message or message["role"] == "tool" for message in plain)
        if tools:
            with contextlib.suppress(Exception):
                return rendered([_with_json_arguments(message) for message in plain])
        hint = ". It has tool calls; the template may not support them" if tools else ""
        raise ChatProblem(f"the chat template rejects this chat: {_reason(error)}{hint}") from error


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _difference(one: str, other: str) -> str:
    """Where two renderings begin to differ, with a few characters of both."""
    at = next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return f"{_short(one[at:])} instead of {_short(other[at:])}"


def _short(text: str, longest: int = 40) -> str:
    return repr(text if len(text) <= longest else text[:longest] + "…")


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {text}"
