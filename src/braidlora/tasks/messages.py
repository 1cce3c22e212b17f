"""Chats as data has them, as one list of messages: OpenAI's `messages`, ShareGPT's `conversations`. No torch here.

A message is `{"role", "content"}`, with `tool_calls`, `name`, `tool_call_id` or `reasoning_content` where the data has
them. Old spellings become the current ones (`function_call` → `tool_calls`, the arguments' JSON text → an object), as
chat templates expect them. Nothing is dropped: what cannot be expressed makes a bad row.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from braidlora.tasks._task import BadRow

COLUMNS = ("messages", "conversations")
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of the sides, and those of datasets in its layout.
_SIDES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}


def find_chat(columns: Mapping[str, Any], named: Mapping[Any, str]) -> str | None:
    """The column that holds a row's chat; None if the row is not one.

    Args:
        columns: of the row.
        named: the recipe's `columns`. With columns for instruction, input or output the rows are not chats.
    """
    if "messages" in named:
        return named["messages"]
    if {"instruction", "input", "output"} & set(named):
        return None
    return next((name for name in COLUMNS if _holds_list(columns.get(name))), None)


def _holds_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def read_chat(columns: Mapping[str, Any], column: str, tools_column: str | None = None) -> dict[str, Any]:
    """`{"messages": [...]}` of a row, and `tools` if it has any.

    Args:
        columns: of the row; besides the chat and `tools`, a text in `system` is its system prompt.
        column: with the messages.
        tools_column: with the tools, if it is not `tools` (or `functions`).

    Raises:
        BadRow: the column is missing, or holds something that is not a chat.
    """
    value = _parsed(columns.get(column), column)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        got = "nothing" if value is None else "an empty list" if value == [] else type(value).__name__
        raise BadRow(f"the column {column!r} needs a list of messages; got {got}")
    messages = [_message(one, f"{column}[{at}]") for at, one in enumerate(value)]
    system = columns.get("system")
    if isinstance(system, str) and system.strip():
        if messages[0]["role"] in ("system", "developer"):
            raise BadRow(f"a system prompt in the column 'system' and another one in {column}[0]; remove one")
        messages.insert(0, {"role": "system", "content": system})
    _check_order(messages, column)
    chat: dict[str, Any] = {"messages": messages}
    if tools := _tools(columns, tools_column):
        chat["tools"] = tools
    try:
        json.dumps(chat, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"the column {column!r} is not UTF-8 text; save the file as UTF-8") from None
    except (TypeError, ValueError) as error:
        raise BadRow(f"the column {column!r} holds something that is not JSON: {error}") from None
    return chat


def last_answer(messages: Sequence[Mapping[str, Any]], column: str) -> str:
    """The text of the last message, which must be the assistant's: its content, or its tool calls as JSON lines.

    Raises:
        BadRow: the last message is someone else's, or an assistant's message is empty.
    """
    for at, message in enumerate(messages):
        written = str(message.get("content") or "").strip()
        if message["role"] == "assistant" and not written and "tool_calls" not in message:
            raise BadRow(f"the assistant's message {at} in {column!r} is empty")
    last = messages[-1]
    if last["role"] != "assistant":
        raise BadRow(
            f"the last message in {column!r} is the {last['role']}'s; expected the assistant's, which is the answer to "
            "learn (or to score)"
        )
    if last.get("content"):
        return str(last["content"])
    calls = [call["function"] for call in last["tool_calls"]]
    return "\n".join(json.dumps(call, ensure_ascii=False) for call in calls)


def _parsed(value: Any, place: str) -> Any:
    """JSON text, as tables hold lists, becomes its value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{place}: expected a list, got text that is not JSON: {error}") from None


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(f"{place}: expected a message with `role` and `content`, got {json.dumps(value)[:60]}")
    given = {key: one for key, one in value.items() if not _is_null(one)}
    if "role" in given:
        role, content = given.pop("role"), given.pop("content", None)
        role = "tool" if role == "function" else role
        known: Sequence[str] = ROLES
    elif "from" in given:
        side, content = given.pop("from"), given.pop("value", None)
        role = _SIDES.get(str(side).strip().lower(), side)
        known = (*ROLES, *_SIDES)
    else:
        there = ", ".join(map(str, value)) or "nothing"
        raise BadRow(f"{place}: a message needs `role` and `content` (or `from` and `value`); it has {there}")
    if role not in (*ROLES, "function_call"):
        raise BadRow(f"{place}: unknown role {str(role)[:40]!r}; expected one of {', '.join(known)}")
    message = {"role": role, **given}
    if role == "function_call":
        calls = _parsed(content, place)
        message = {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
        content = None
    if "function_call" in message:
        message["tool_calls"] = [*(message.get("tool_calls") or []), message.pop("function_call")]
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = _calls(calls, message["role"], place)
    _check_weight(message, place)
    text = _text(content, place)
    if not text.strip() and message["role"] == "user":
        raise BadRow(f"{place}: the user's message is empty")
    if text or "tool_calls" not in message:
        message["content"] = text
    return message


def _text(content: Any, place: str) -> str:
    """The text of a message: a text, or a list of text parts, which are joined by line breaks."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        parts = []
        for part in content:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts.append(part["text"])
                continue
            kind = part.get("type", "part without text") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"{place}: has a part of type {str(kind)[:40]!r}; only text is supported")
        return "\n".join(parts)
    if isinstance(content, Mapping):  # a tool's result as an object
        return json.dumps(content, ensure_ascii=False)
    raise BadRow(f"{place}: the content is {type(content).__name__}; expected text")


def _calls(calls: Any, role: str, place: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise BadRow(f"{place}: tool calls in the {role}'s message; only the assistant calls tools")
    calls = _parsed(calls, f"{place}.tool_calls")
    if not isinstance(calls, list):
        raise BadRow(f"{place}.tool_calls: expected a list, got {type(calls).__name__}")
    found = []
    for at, call in enumerate(calls):
        here = f"{place}.tool_calls[{at}]"
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise BadRow(f"{here}: expected a function with `name` and `arguments`")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{here}.arguments") if arguments.strip() else {}
        if _is_null(arguments):
            arguments = {}
        if not isinstance(arguments, Mapping):
            raise BadRow(f"{here}.arguments: expected an object, got {json.dumps(arguments)[:60]}")
        rest = {key: one for key, one in call.items() if key in ("id", "index") and not _is_null(one)}
        function = {"name": inner["name"], "arguments": dict(arguments)}
        found.append({**rest, "type": "function", "function": function})
    return found


def _tools(columns: Mapping[str, Any], named: str | None) -> list[dict[str, Any]]:
    column = named or next((name for name in ("tools", "functions") if not _is_null(columns.get(name))), None)
    if column is None:
        return []
    if column not in columns:
        raise BadRow(
            f"no column {column!r}, which `columns.tools` names (the columns are {', '.join(columns)})"
        )
    value = columns[column]
    if _is_null(value) or (isinstance(value, str) and not value.strip()):
        return []
    tools = _parsed(value, f"the column {column!r}")
    if not isinstance(tools, list):
        raise BadRow(f"the column {column!r}: expected a list of tools, got {type(tools).__name__}")
    found = []
    for at, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise BadRow(f"{column}[{at}]: expected a tool with `name`, `description` and `parameters`")
        found.append({"type": "function", "function": dict(inner)})
    return found


def _check_weight(message: Mapping[str, Any], place: str) -> None:
    """OpenAI's `weight`: 0 on an assistant message that is not to be learned."""
    if "weight" not in message:
        return
    if message["role"] != "assistant":
        raise BadRow(
            f"{place}: `weight` belongs to the assistant's messages, and this is the {message['role']}'s"
        )
    if message["weight"] not in (0, 1):
        raise BadRow(f"{place}: `weight` is {message['weight']!r}; expected 0 (no loss) or 1")


def _check_order(messages: Sequence[Mapping[str, Any]], column: str) -> None:
    if messages[0]["role"] in ("assistant", "tool"):
        raise BadRow(
            f"the first message in {column!r} is the {messages[0]['role']}'s; a chat begins with the user's, or with a "
            "system prompt"
        )
    for before, message in itertools.pairwise(messages):
        if message["role"] == "tool" and before["role"] not in ("assistant", "tool"):
            raise BadRow(
                f"a tool's message in {column!r} follows the {before['role']}'s, which called no tool"
            )


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
