"""Encoding: the prompt's tokens, the label mask, truncation (fault 5)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from task_helpers import CHAT, byte_level_tokenizer, encode_example

from braidlora.config import PromptSection
from braidlora.errors import ConfigError
from braidlora.tasks import (
    IGNORED,
    encode_answer,
    encode_examples,
    encode_prompt,
    encode_texts,
    get_template,
)

ROW = {"instruction": "Is the fox quick?", "input": "", "output": "yes", "answer": "yes"}
BYTES = byte_level_tokenizer()
TEMPLATES = ["alpaca", "alpaca_short", "llm-adapters", "llm-adapters-legacy", "{instruction}"]


@pytest.fixture(params=["stories", "bytes"])
def tokenizer(request):
    return request.getfixturevalue("stories_tokenizer") if request.param == "stories" else BYTES


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_and_generation_start_from_the_same_tokens(tokenizer, name):
    template = get_template(name)
    encoded = encode_example(ROW, template, tokenizer, PromptSection(template=name, cutoff=512))
    prompt = encode_prompt(ROW, template, tokenizer, 512)
    answer = encode_answer("yes", tokenizer)
    assert encoded is not None
    assert not encoded.truncated
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True).endswith("yes")
    if name == "llm-adapters-legacy":  # on purpose: the research code's prompts differ
        assert encoded.input_ids[: len(prompt)] != prompt
        return
    assert encoded.input_ids == prompt + answer
    assert encoded.labels == [IGNORED] * len(prompt) + answer


def test_no_token_spans_the_boundary_though_the_tokenizer_would_merge_there():
    row, template = {**ROW, "output": "og"}, get_template("{instruction} the lazy d")
    prompt = encode_prompt(row, template, BYTES, 100)
    joint = BYTES(template.prompt(row) + "og", add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt, "the example must have a merge across the boundary"
    encoded = encode_example(row, template, BYTES, PromptSection(cutoff=100))
    assert encoded is not None
    assert encoded.input_ids[: len(prompt)] == prompt
    assert BYTES.decode(encoded.input_ids[len(prompt) : -1]) == "og"


def test_bos_stands_first_where_the_tokenizer_has_one(stories_tokenizer):
    template = get_template("{instruction}")
    section = PromptSection(cutoff=64)
    with_bos = encode_example(ROW, template, stories_tokenizer, section)
    without = encode_example(ROW, template, BYTES, section)
    assert with_bos is not None
    assert without is not None
    assert with_bos.input_ids[0] == stories_tokenizer.bos_token_id
    assert with_bos.input_ids[1:].count(stories_tokenizer.bos_token_id) == 1  # its EOS is the same token
    assert BYTES.decode(without.input_ids[:-1]) == "Is the fox quick?yes"


def test_train_on_prompt_gives_every_token_but_the_first_a_loss(tokenizer):
    encoded = encode_example(ROW, get_template("alpaca"), tokenizer, PromptSection(train_on_prompt=True))
    assert encoded is not None
    assert encoded.labels == [IGNORED, *encoded.input_ids[1:]]


def test_legacy_tokenizes_prompt_and_answer_as_one_string(stories_tokenizer):
    template = get_template("llm-adapters-legacy")
    encoded = encode_example(ROW, template, stories_tokenizer, PromptSection(cutoff=512))
    whole = stories_tokenizer(template.prompt(ROW) + "yes")["input_ids"]
    assert encoded is not None
    assert encoded.input_ids == [*whole, stories_tokenizer.eos_token_id]
    with_loss = [token for token in encoded.labels if token != IGNORED]
    assert stories_tokenizer.decode(with_loss, skip_special_tokens=True).strip() == "yes"


def test_chat_closes_the_turn_before_eos():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHAT
    encoded = encode_example(ROW, get_template("chat"), tokenizer, PromptSection(cutoff=100))
    assert encoded is not None
    text = "<|turn|>user\nIs the fox quick?<|turn|>\n<|turn|>assistant\nyes<|turn|><|end|>"
    assert tokenizer.decode(encoded.input_ids) == text
    with_loss = [token for token in encoded.labels if token != IGNORED]
    assert tokenizer.decode(with_loss) == "yes<|turn|><|end|>"
    prompt = encode_prompt(ROW, get_template("chat"), tokenizer, 100)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels == [IGNORED] * len(prompt) + with_loss


def test_chat_does_not_end_twice_where_the_turn_ends_with_eos():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHAT.replace("{{ message.content }}<|turn|>", "{{ message.content }}<|end|>")
    encoded = encode_example(ROW, get_template("chat"), tokenizer, PromptSection(cutoff=100))
    assert encoded is not None
    assert tokenizer.decode(encoded.input_ids).endswith("assistant\nyes<|end|>")
    assert encode_answer("yes<|end|>", tokenizer) == encode_answer("yes", tokenizer)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    instruction=st.text(max_size=200).filter(str.strip),
    output=st.text(max_size=120).filter(str.strip),
    cutoff=st.integers(8, 300),
    name=st.sampled_from(TEMPLATES),
    on_prompt=st.booleans(),
)
def test_truncation_keeps_answer_and_eos_and_the_prompts_end(instruction, output, cutoff, name, on_prompt):
    row = {"instruction": instruction, "input": "", "output": output, "answer": output}
    template = get_template(name)
    section = PromptSection(template=name, cutoff=cutoff, train_on_prompt=on_prompt)
    encoded = encode_example(row, template, BYTES, section)
    whole = encode_example(row, template, BYTES, section.model_copy(update={"cutoff": 100_000}))
    silent = encode_example(row, template, BYTES, PromptSection(template=name, cutoff=100_000))
    assert whole is not None
    assert silent is not None
    answer = [label for label in silent.labels if label != IGNORED]
    assert answer[-1] == BYTES.eos_token_id
    if len(answer) > cutoff:
        assert encoded is None
        return
    assert encoded is not None
    assert len(encoded.input_ids) == len(encoded.labels) <= cutoff
    assert encoded.input_ids == whole.input_ids[-len(encoded.input_ids) :]
    assert encoded.truncated == (len(whole.input_ids) > cutoff)
    assert any(label != IGNORED for label in encoded.labels)
    if not on_prompt and len(answer) < cutoff:
        assert [label for label in encoded.labels if label != IGNORED] == answer


def test_a_truncated_prompt_keeps_bos_and_its_end(stories_tokenizer):
    row = {**ROW, "instruction": "word " * 300 + "last words?"}
    template = get_template("alpaca_short")
    encoded = encode_example(row, template, stories_tokenizer, PromptSection(cutoff=60))
    assert encoded is not None
    assert encoded.truncated
    assert len(encoded.input_ids) == 60
    assert encoded.input_ids[0] == stories_tokenizer.bos_token_id
    text = stories_tokenizer.decode(encoded.input_ids, skip_special_tokens=True)
    assert "last words?\n\n### Response:\n" in text
    assert text.endswith("yes")
    prompt = encode_prompt(row, template, stories_tokenizer, 60)
    assert len(prompt) == 60
    assert prompt[0] == stories_tokenizer.bos_token_id
    assert stories_tokenizer.decode(prompt).endswith("last words?\n\n### Response:\n")


def test_a_batch_is_encoded_as_its_rows_are_one_by_one(tokenizer):
    rows = [{**ROW, "output": "yes " * count} for count in (1, 100, 2)]
    section = PromptSection(cutoff=32)
    together = encode_examples(rows, get_template("alpaca_short"), tokenizer, section)
    assert together == [encode_example(row, get_template("alpaca_short"), tokenizer, section) for row in rows]
    assert together[1] is None


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no EOS token"):
        encode_example(ROW, get_template("alpaca"), tokenizer, PromptSection())


def test_texts_keep_the_tokenizers_special_tokens_when_they_are_cut(stories_tokenizer):
    template = get_template("alpaca", "classify")
    rows = [{"text": "short", "label": "a"}, {"text": "long " * 50, "label": "b"}]
    short, long = encode_texts(rows, template, stories_tokenizer, 16)
    assert short.input_ids == stories_tokenizer("short")["input_ids"]
    assert (short.truncated, long.truncated) == (False, True)
    assert len(long.input_ids) == 16
    assert long.input_ids[0] == stories_tokenizer.bos_token_id
