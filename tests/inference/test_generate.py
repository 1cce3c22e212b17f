"""Continuations: greedy, drawn, stopped, streamed, and of chats."""

import io

import pytest

import braidlora
from braidlora.errors import ConfigError, DataError
from braidlora.inference.sampling import Sampling
from braidlora.inference.streaming import Printer


@pytest.fixture(scope="module")
def model(writer):
    return braidlora.load(writer)


def test_a_prompt_is_put_into_the_tasks_template(model):
    wrapped = model.generate("rising 3 1 2")
    assert wrapped == model.predict("rising 3 1 2", "rising")[0]["prediction"]
    assert wrapped == model.generate("rising 3 1 2 =", raw=True)
    assert model.generate(["rising 3 1 2", {"instruction": "rising 3 1 2"}]) == [wrapped, wrapped]


def test_draws_depend_on_the_seed_alone(model):
    drawn = [
        model.generate(["rising 3 1 2"] * 4, temperature=5.0, top_k=20, top_p=0.95, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_low_temperature_is_greedy(model):
    assert model.generate("rising 3 1 2", temperature=1e-4) == model.generate("rising 3 1 2")


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(model):
    text = model.generate("rising 3 1 2")
    assert len(text) > 2
    assert model.generate("rising 3 1 2", stop=(text[2:],)) == text[:2].strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "--temperature: got -1; expected 0 to 100"),
        ({"temperature": float("nan")}, "--temperature: got nan"),
        ({"temperature": 1, "top_p": 2}, "--top-p: got 2"),
        ({"max_new_tokens": 0}, "--max-new-tokens: got 0"),
        ({"top_k": 3}, "no effect at temperature 0"),
        ({"stop": ["a", ""]}, "--stop: got an empty text"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_prompts_that_cannot_be_read_are_refused(model):
    with pytest.raises(DataError, match="prompt 1: needs a text `instruction` or `input`; it has foo"):
        model.generate({"foo": "a"})
    with pytest.raises(ConfigError, match="needs a chat template"):
        model.generate([{"role": "user", "content": "a"}])
    with pytest.raises(ConfigError, match=r"leave no room for a prompt"):
        model.generate("a", max_new_tokens=2**20)


def test_a_chat_goes_through_the_chat_template(model, monkeypatch):
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": "rising 3 1 2"}]
    bos = model.tokenizer.bos_token
    monkeypatch.setattr(model.tokenizer, "chat_template", bos + template)
    assert model.generate(chat) == model.generate("rising 3 1 2 =", raw=True)


def test_streamed_text_is_the_answer_escaped(model, capsys):
    text = model.generate("rising 3 1 2", streamer=Printer(model.tokenizer))
    assert capsys.readouterr().out.strip() == text
    model.generate("rising 3 1 2", streamer=Printer(model.tokenizer, (text[2:],)), stop=(text[2:],))
    assert capsys.readouterr().out.strip() == text[:2].strip()
    printer = Printer(model.tokenizer)
    printer.on_finalized_text("a\x1b[2Jb", stream_end=True)
    assert capsys.readouterr().out == "a\\x1b[2Jb\n"


def test_the_base_alone_continues_a_prompt():
    base = braidlora.load("embedded")
    assert base.tasks == []
    assert base.generate("class wolf =", max_new_tokens=4) == "animal"
    with pytest.raises(ConfigError, match="does not record its tasks"):
        base.predict("a")


def test_a_chat_on_the_command_line(writer, monkeypatch, capsys):
    from braidlora.cli import main

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["generate", str(writer), "--chat"]) == 2
    assert "needs a chat template" in capsys.readouterr().err
