"""Chats under small templates: which tokens have loss, what happens to long chats, and what is refused."""

from __future__ import annotations

import json

import pytest
from chat_helpers import (
    CALLING,
    MULTI,
    SINGLE,
    SYSTEM,
    TOOLS,
    assistant,
    encoded,
    learned,
    tokenizer_for,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from task_helpers import CHAT, config_of

from braidlora.config import PromptSection
from braidlora.errors import DataError
from braidlora.tasks import encode_prompt, encode_tasks, get_template, load_tasks
from braidlora.tasks._task import ChatRow
from braidlora.tasks.encode_chat import tokenized_turns
from braidlora.tasks.preview import preview

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}<|u|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


def test_loss_on_all_turns_or_the_last_one():
    tokenizer = tokenizer_for(CHAT)
    [one] = encoded({"messages": SYSTEM}, tokenizer)
    assert learned(one, tokenizer) == ["replyone<|turn|>", "replytwo<|turn|>", "replythree<|turn|><|end|>"]
    [last] = encoded({"messages": SYSTEM}, tokenizer, train_on_turns="last")
    assert learned(last, tokenizer) == ["replythree<|turn|><|end|>"]
    assert last.input_ids == one.input_ids
    [every] = encoded({"messages": SYSTEM}, tokenizer, train_on_prompt=True)
    assert every.labels[1:] == every.input_ids[1:] == one.input_ids[1:]


def test_a_message_with_weight_0_has_no_loss():
    tokenizer = tokenizer_for(CHAT)
    chat = [MULTI[0], {**MULTI[1], "weight": 0}, *MULTI[2:4], MULTI[4], {**MULTI[5], "weight": 0}]
    [one] = encoded({"messages": chat}, tokenizer)
    assert learned(one, tokenizer) == ["replytwo<|turn|><|end|>"]
    with pytest.raises(DataError, match="no assistant turn contributes to the loss"):
        encoded({"messages": [MULTI[0], {**MULTI[1], "weight": 0}]}, tokenizer)


def test_an_instruction_is_a_chat_of_two_messages():
    tokenizer = tokenizer_for(CHAT)
    row = {"instruction": "askone", "input": "", "output": "replyone"}
    assert encoded(row, tokenizer) == encoded({"messages": SINGLE}, tokenizer)


def test_training_and_evaluation_start_from_the_same_tokens():
    tokenizer = tokenizer_for(MARKED)
    row = {"messages": MULTI}
    [one] = encoded(row, tokenizer, train_on_turns="last")
    prompt = encode_prompt(row, get_template("chat"), tokenizer, 4096)
    assert one.input_ids[: len(prompt)] == prompt
    assert one.labels == [-100] * len(prompt) + one.input_ids[len(prompt) :]
    unanswered = {"messages": MULTI[:-1]}
    assert encode_prompt(unanswered, get_template("chat"), tokenizer, 4096) == prompt


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=2, max_size=6
    )
)
def test_labels_are_the_assistants_texts_whatever_they_are(texts):
    """No character of a prompt is learned and none of an answer is lost, though tokens would merge across the ends."""
    tokenizer = tokenizer_for(CHAT)
    texts = texts[: len(texts) // 2 * 2]
    chat = [user(text) if at % 2 == 0 else assistant(text) for at, text in enumerate(texts)]
    found = [text for one in encoded({"messages": chat}, tokenizer) for text in learned(one, tokenizer)]
    assert sorted(text.removesuffix("<|end|>") for text in found) == sorted(
        f"{text}<|turn|>" for text in texts[1::2]
    )


def test_a_turn_whose_tokens_depend_on_what_follows_gets_its_own_sequence():
    """The tokenizer reads 'n n' as one token, so the answer 'n' after the prompt 'n ' needs tokens of its own."""

    def tokenize(texts):
        return [
            [text.count("nn"), *map(ord, text.replace("nn", ""))] if "nn" in text else list(map(ord, text))
            for text in texts
        ]

    assert tokenized_turns("ab", [(1, 2)], tokenize) == [([97, 98], [(1, 2)])]
    assert tokenized_turns("nnx", [(1, 2), (2, 3)], tokenize) == [
        ([110, 110], [(1, 2)]),
        ([1, 120], [(1, 2)]),
    ]


def test_long_chats_lose_tokens_at_their_start_and_cut_turns_have_no_loss():
    tokenizer = tokenizer_for(CHAT)
    [complete] = encoded({"messages": MULTI}, tokenizer)
    length = len(complete.input_ids)
    for cutoff in range(8, length + 1):
        [one] = encoded({"messages": MULTI}, tokenizer, cutoff=cutoff)
        last = learned(complete, tokenizer)[-1]
        if one is None:  # the last turn alone is longer
            assert cutoff < len(tokenizer(last)["input_ids"]) + 1
            continue
        assert one.input_ids == complete.input_ids[length - len(one.input_ids) :]
        assert len(one.input_ids) == min(cutoff, length)
        assert one.truncated == (cutoff < length)
        turns = learned(one, tokenizer)
        kept = learned(complete, tokenizer)[3 - len(turns) :]
        assert turns[1:] == kept[1:]
        assert kept[0].endswith(turns[0])  # nothing predicts the first token of a sequence, so it has no loss
        assert len(kept[0]) - len(turns[0]) <= 2


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            CHAT.replace("{{ message.role }}", "{{ raise_exception('no way') }}"),
            {"messages": SINGLE},
            "rejects this chat: no way",
        ),
        (
            CHAT.replace("<|turn|>{{", "{% if message.role != 'system' %}<|turn|>{{").replace(
                "<|turn|>\n{% endfor", "<|turn|>\n{% endif %}{% endfor"
            ),
            {"messages": SYSTEM},
            "leaves out message 0, the system's",
        ),
        (CHAT, {"messages": SINGLE, "tools": TOOLS}, "leaves out the tool 'weather'; it seems to ignore `tools`"),
        (CHAT, {"messages": CALLING}, "leaves out or changes the tool call 'weather' of message 1"),
        (
            CHAT.replace("message.content", "message.content.strip()"),
            {"messages": CALLING},
            "It has tool calls; the template may not support them",
        ),
        (
            CHAT.replace("<|turn|>assistant\n", "<|turn|>assistant\n<think>"),
            {"messages": SINGLE},
            "generation prompt for message 1 differs from how it renders this message: '<think>'",
        ),
        (
            CHAT.replace("message.content", "message.content.split('</think>')[-1]"),
            {"messages": [user("a"), assistant("<think>deep</think>b")]},
            "leaves out or changes the content 'deep' of message 1, so the model would not learn it",
        ),
        (
            MARKED,
            {"messages": [user("a"), {**assistant("b"), "reasoning_content": "deep"}]},
            "leaves out or changes the reasoning_content 'deep' of message 1",
        ),
    ],
)  # fmt: skip
def test_what_a_template_cannot_render_exactly_is_refused_with_the_place(template, row, message):
    chat = ChatRow(json.loads(json.dumps(row)))
    chat.place = "rows.jsonl:7"
    tokenizer = tokenizer_for(template)
    from braidlora.tasks import encode_examples

    with pytest.raises(DataError) as caught:
        encode_examples([chat], get_template("chat"), tokenizer, PromptSection(cutoff=999))
    assert str(caught.value).startswith("rows.jsonl:7: the chat template")
    assert message in str(caught.value)


def test_rejected_chats_are_skipped_and_counted(rows_file):
    rows = [{"messages": SINGLE}, {"messages": SYSTEM}]
    config = config_of(rows_file(rows), prompt={"bad_rows": "skip", "cutoff": 999})
    tasks = load_tasks(config)
    tokenizer = tokenizer_for(
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHAT
    )
    data = encode_tasks(tasks, tokenizer, config.prompt)
    counts = data.counts["t"]
    assert (len(data), counts.rows, counts.rejected) == (1, 1, 1)
    assert counts.problems[0].endswith("rows.jsonl:2: the chat template rejects this chat: none")
    text = preview(config, tokenizer)
    assert "1 rejected" in text
    assert "the first rejected row: " in text
    assert "<|turn|>assistant\n     ⟦replyone<|turn|><|end|>⟧" in text
    with pytest.raises(
        DataError, match=r"task t, train: .*rows\.jsonl:2: the chat template rejects.*prompt.bad_rows=skip"
    ):
        encode_tasks(tasks, tokenizer, PromptSection(cutoff=999))


def test_several_turns_survive_the_dataset(rows_file):
    config = config_of(rows_file([{"messages": MULTI}, {"messages": SINGLE}]), prompt={"cutoff": 999})
    tokenizer = tokenizer_for(CHAT)
    data = encode_tasks(load_tasks(config), tokenizer, config.prompt)
    for item, messages in ((data[0], MULTI), (data[1], SINGLE)):
        [one] = encoded({"messages": messages}, tokenizer)
        assert (item["input_ids"], item["labels"]) == (one.input_ids, one.labels)


def test_a_template_may_not_touch_python(rows_file):
    """transformers renders in a sandbox; an attack is a rejected chat."""
    tokenizer = tokenizer_for("{{ messages.__class__.__mro__[1].__subclasses__() }}" + CHAT)
    with pytest.raises(DataError, match="rejects this chat: SecurityError"):
        encoded({"messages": SINGLE}, tokenizer)
