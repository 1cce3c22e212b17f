"""Rows that are chats: every layout that data has becomes the same messages, and every mistake names its place."""

from __future__ import annotations

import json

import pytest
from chat_helpers import CALL, CALLING, MULTI, SYSTEM, TOOLS
from task_helpers import config_of

from braidlora.errors import ConfigError, DataError
from braidlora.tasks import load_tasks
from braidlora.tasks.load import check_chat_settings

SIDES = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.fixture
def loaded(rows_file):
    def load(*rows, task=None, **sections):
        return load_tasks(config_of(rows_file(list(rows)), task=task, **sections))[0]

    return load


@pytest.fixture
def problem(loaded):
    """The message about the only row of a file."""

    def of(row, **options):
        with pytest.raises(DataError) as caught:
            loaded(row, **options)
        assert "rows.jsonl:1: " in str(caught.value)
        assert "(task t, train)" in str(caught.value)
        return str(caught.value)

    return of


def test_openai_messages_and_sharegpt_conversations_are_the_same_rows(loaded):
    sharegpt = [{"from": SIDES[one["role"]], "value": one["content"]} for one in SYSTEM]
    for row in ({"messages": SYSTEM}, {"conversations": sharegpt}, {"messages": json.dumps(SYSTEM)}):
        task = loaded(row)
        assert task.train == [{"messages": SYSTEM, "output": "replythree", "answer": "replythree"}]
        assert task.template.chat
    assert loaded({"system": "besystem", "conversations": sharegpt[1:]}).train == task.train


def test_a_column_of_another_name(loaded):
    task = {"columns": {"messages": "dialog", "tools": "apis"}}
    row = loaded({"dialog": CALLING, "apis": TOOLS}, task=task).train[0]
    assert (row["messages"], row["tools"]) == (CALLING, TOOLS)


def test_tool_calls_in_every_spelling(loaded):
    """JSON text and objects, OpenAI's old `function_call` and `functions`, ShareGPT's sides."""
    text = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    plain = {"type": "function", "function": CALL["function"]}
    result = {"role": "tool", "content": "gotrain"}
    wanted = [MULTI[0], {"role": "assistant", "tool_calls": [plain]}, result, MULTI[1]]
    old = [
        MULTI[0],
        {"role": "assistant", "content": None, "function_call": text["function"]},
        {"role": "function", "content": "gotrain"},
        MULTI[1],
    ]
    sharegpt = [
        {"from": "human", "value": "askone"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "gotrain"},
        {"from": "gpt", "value": "replyone"},
    ]
    bare = [tool["function"] for tool in TOOLS]
    for row in ({"messages": old, "functions": bare}, {"conversations": sharegpt, "tools": json.dumps(bare)}):
        [found] = loaded(row).train
        assert (found["messages"], found["tools"]) == (wanted, TOOLS)
    [found] = loaded(
        {"messages": [MULTI[0], {"role": "assistant", "tool_calls": [text]}], "tools": TOOLS}
    ).train
    assert found["messages"][1]["tool_calls"] == [CALL]
    assert json.loads(found["output"]) == CALL["function"]


def test_text_parts_are_joined(loaded):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert loaded({"messages": [{"role": "user", "content": parts}, MULTI[1]]}).train[0]["messages"][0] == {
        "role": "user",
        "content": "one\ntwo",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "the column 'messages' needs a list of messages; got an empty list"),
        ({"messages": '[{"role": '}, "messages: expected a list, got text that is not JSON"),
        ({"messages": ["hello"]}, r'messages[0]: expected a message with `role` and `content`, got "hello"'),
        ({"messages": [{"content": "a"}]}, "messages[0]: a message needs `role` and `content` (or `from`"),
        ({"messages": [{"role": "human", "content": "a"}]}, "messages[0]: unknown role 'human'; expected one of sys"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown role 'alien'; expected one of"),
        ({"messages": [*MULTI, MULTI[0]]}, "the last message in 'messages' is the user's; expected the assistant's"),
        ({"messages": [MULTI[1]]}, "the first message in 'messages' is the assistant's; a chat begins with the user's"),
        ({"messages": [{"role": "user", "content": " "}, MULTI[1]]}, "messages[0]: the user's message is empty"),
        ({"messages": [MULTI[0], {"role": "assistant"}]}, "the assistant's message 1 in 'messages' is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]: has a part of type 'image_url'; only text is supported",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]: the content is int; expected text"),
        (
            {"messages": [MULTI[0], {"role": "tool", "content": "x"}, MULTI[1]]},
            "a tool's message in 'messages' follows the user's, which called no tool",
        ),
        (
            {"messages": [MULTI[0], {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages[1].tool_calls[0]: expected a function with `name` and `arguments`",
        ),
        (
            {"messages": [MULTI[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "messages[1].tool_calls[0].arguments: expected a list, got text that is not JSON",
        ),
        (
            {"messages": [MULTI[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "messages[1].tool_calls[0].arguments: expected an object, got [1]",
        ),
        (
            {"messages": [{**MULTI[0], "tool_calls": [CALL]}, MULTI[1]]},
            "messages[0]: tool calls in the user's message; only the assistant calls tools",
        ),
        ({"messages": MULTI, "tools": {"name": "f"}}, "the column 'tools': expected a list of tools, got dict"),
        ({"messages": MULTI, "tools": [{"x": 1}]}, "tools[0]: expected a tool with `name`, `description`"),
        ({"messages": [MULTI[0], {**MULTI[1], "weight": 2}]}, "messages[1]: `weight` is 2; expected 0 (no loss) or 1"),
        ({"messages": [{**MULTI[0], "weight": 0}, MULTI[1]]}, "`weight` belongs to the assistant's messages"),
        ({"messages": SYSTEM, "system": "x"}, "a system prompt in the column 'system' and another one in messages[0]"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_chat_says_where(problem, row, message):
    assert message in problem(row)


def test_bad_chats_are_skipped_and_counted(loaded):
    task = loaded({"messages": MULTI}, {"messages": []}, prompt={"bad_rows": "skip"})
    assert (len(task.train), task.counts["train"].skipped) == (1, 1)


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {},
            "this is preference data (a 'chosen' and a 'rejected' answer per row), but braidlora trains on one "
            "correct answer per row. For preference training, use TRL: DPOTrainer, or `trl dpo`. To train on the "
            "better answers only, set "
            "columns.output=chosen (task t, train).",
        ),
        ({"chosen": MULTI, "rejected": MULTI}, {}, "set columns.messages=chosen"),
        (
            {"chosen": "a", "rejected": "b"},
            {"kind": "classify"},
            "For preference training, use TRL: DPOTrainer",
        ),
        ({"prompt": "p", "completion": "c", "label": True}, {}, "For judged answers, use TRL's KTOTrainer"),
    ],
)
def test_preference_files_are_named_as_such(problem, row, task, message):
    assert message in problem(row, task=task)
    assert "bad_rows" not in problem(row, task=task)  # the recipe is wrong, not a row


def test_the_better_answers_can_be_imitated(loaded):
    chat = loaded({"chosen": MULTI, "rejected": MULTI}, task={"columns": {"messages": "chosen"}})
    assert chat.train[0]["messages"] == MULTI
    columns = {"instruction": "prompt", "output": "chosen"}
    row = loaded({"prompt": "p", "chosen": "a", "rejected": "b"}, task={"columns": columns}).train[0]
    assert (row["instruction"], row["output"]) == ("p", "a")


def test_settings_that_do_not_fit_chats(loaded):
    with pytest.raises(
        ConfigError, match=r"prompt.template: 'alpaca_short' has no place for a chat.*set it to chat"
    ):
        loaded({"messages": MULTI}, prompt={"template": "alpaca_short"})
    with pytest.raises(ConfigError, match=r"tasks.t.template: 'alpaca' has no place for a chat"):
        loaded({"messages": MULTI}, task={"template": "alpaca"})
    with pytest.raises(
        DataError, match=r"task t: 1 rows are chats \(`messages`\), and 1 have an instruction"
    ):
        loaded({"messages": MULTI}, {"instruction": "a", "output": "b"})


@pytest.mark.parametrize(
    ("row", "prompt", "message"),
    [
        ({"instruction": "a", "output": "b"}, {"train_on_turns": "last"}, "turns: has no effect, because no"),
        ({"instruction": "a", "output": "b"}, {"chat_template_kwargs": {"a": 1}}, "kwargs: has no effect"),
        ({"messages": MULTI}, {"train_on_turns": "last", "train_on_prompt": True}, "has no effect with prompt.tr"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_rejected(rows_file, row, prompt, message):
    config = config_of(rows_file([row]), prompt=prompt)
    with pytest.raises(ConfigError, match=message):
        check_chat_settings(load_tasks(config), config.prompt)


def test_rows_with_the_same_chat_stay_in_one_part(rows_file):
    rows = [{"messages": [{"role": "user", "content": f"q{n // 2}"}, MULTI[1]]} for n in range(40)]
    task = load_tasks(config_of(rows_file(rows), split={"test": 0.3}))[0]
    assert not {json.dumps(row["messages"][0]) for row in task.train} & {
        json.dumps(row["messages"][0]) for row in task.test
    }
    assert task.test
