"""Prompt templates to the character."""

from __future__ import annotations

import pytest
from task_helpers import CHAT, byte_level_tokenizer

from braidlora.errors import ConfigError
from braidlora.tasks import get_template

WITH = {"instruction": "Add {x}.\nNow.", "input": "1 2", "output": "3"}
WITHOUT = {"instruction": "Say hi.", "input": "", "output": "hi"}


def test_alpaca():
    template = get_template("alpaca")
    assert template.prompt(WITH) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\nNow.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert template.prompt(WITHOUT) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )


def test_alpaca_short():
    template = get_template("alpaca_short")
    assert template.prompt(WITH) == "### Instruction:\nAdd {x}.\nNow.\n\n### Input:\n1 2\n\n### Response:\n"
    assert template.prompt(WITHOUT) == "### Instruction:\nSay hi.\n\n### Response:\n"


@pytest.mark.parametrize(
    ("name", "evaluation", "row", "first", "blank"),
    [
        ("llm-adapters", False, WITH, "request.", ""),
        ("llm-adapters", False, WITHOUT, "request. ", ""),
        ("llm-adapters-legacy", True, WITH, "request.", ""),
        ("llm-adapters-legacy", True, WITHOUT, "request. ", ""),
        ("llm-adapters-legacy", False, WITH, "request. ", " " * 16),
        ("llm-adapters-legacy", False, WITHOUT, "request.  ", " " * 16),
    ],
)
def test_llm_adapters_white_space(name, evaluation, row, first, blank):
    """The lines of the prompts in LLM-Adapters' finetune.py (training) and commonsense_evaluate.py (evaluation)."""
    lines = get_template(name).prompt(row, evaluation=evaluation).split("\n")
    assert lines[0].startswith("Below is an instruction that describes a task")
    assert ("paired with an input" in lines[0]) == bool(row["input"])
    assert lines[0].endswith(first)
    assert not lines[0].endswith(first + " ")
    indent = " " * 16
    body = ["", f"{indent}### Instruction:", *(indent + row["instruction"]).split("\n"), blank]
    if row["input"]:
        body += [f"{indent}### Input:", f"{indent}{row['input']}", blank]
    assert lines[1:] == [*body, f"{indent}### Response:", indent]


@pytest.mark.parametrize("name", ["alpaca", "alpaca_short", "llm-adapters", "Q: {instruction} {input}\nA: "])
@pytest.mark.parametrize("row", [WITH, WITHOUT])
def test_evaluation_sees_the_training_prompt(name, row):
    template = get_template(name)
    assert template.prompt(row, evaluation=True) == template.prompt(row)


def test_a_format_string_may_have_literal_braces_and_leaves_those_of_rows_alone():
    template = get_template("{{json}} {instruction}|{input}|")
    assert template.prompt(WITH) == "{json} Add {x}.\nNow.|1 2|"
    assert template.uses_input
    assert not get_template("{instruction}").uses_input


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "alpcaa",
            "generate",
            r"unknown template 'alpcaa'; did you mean `alpaca`\? Expected one of alpaca, alpaca_short",
        ),
        ("zzz", "generate", r"unknown template 'zzz'\. Expected one of"),
        ("{instruction} {context}", "generate", r"unknown field \{context\}.*\{instruction\} and \{input\}"),
        ("{instruction.__class__}", "generate", r"unknown field \{instruction\.__class__\}"),
        ("{instruction!r}", "generate", r"unknown field \{instruction!r\}"),
        ("{instruction:>99999999}", "generate", r"unknown field \{instruction:>99999999\}"),
        ("{} {instruction}", "generate", r"unknown field \{\}"),
        ("{input}", "generate", r"does not use the row; it needs \{instruction\}"),
        ("{instruction", "generate", r"not a valid format string"),
        ("{instruction}", "classify", r"unknown field \{instruction\}.*fields of a row are \{text\}"),
        ("alpaca_short", "classify", r"does not fit a `classify` task"),
    ],
)
def test_a_bad_template_says_why(name, kind, message):
    with pytest.raises(ConfigError, match=message):
        get_template(name, kind)


def test_classify_sees_the_text_alone_or_in_its_own_template():
    assert get_template("alpaca", "classify").prompt({"text": "{so}"}) == "{so}"
    assert get_template("Review: {text}", "classify").prompt({"text": "{so}"}) == "Review: {so}"


def test_chat_uses_the_tokenizers_template_and_its_end_of_turn():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHAT
    template = get_template("chat")
    assert (
        template.prompt(WITH, tokenizer) == "<|turn|>user\nAdd {x}.\nNow.\n\n1 2<|turn|>\n<|turn|>assistant\n"
    )
    assert template.prompt(WITHOUT, tokenizer) == "<|turn|>user\nSay hi.<|turn|>\n<|turn|>assistant\n"
    assert template.written("yes", tokenizer) == "yes<|turn|>"
    assert get_template("alpaca").written("yes", tokenizer) == "yes"


@pytest.mark.parametrize("answer", ["t", "turn", "|", ">", "<|turn|>", " yes "])
def test_the_end_of_turn_does_not_depend_on_the_answer(answer):
    """A short answer may stand in the marker itself: a label such as "e" does in `<|im_end|>`."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHAT
    assert get_template("chat").written(answer, tokenizer) == f"{answer}<|turn|>"


def test_chat_without_a_template_in_the_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"`chat` needs a chat template.*instruction-tuned"):
        get_template("chat").prompt(WITHOUT, byte_level_tokenizer())
