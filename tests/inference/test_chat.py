"""A model trained on chats: evaluated, predicted and chatted with under the template that it was trained with."""

import io
import json
import shutil

import pytest

import braidlora
from braidlora.cli import main
from braidlora.config import RunConfig
from braidlora.errors import CheckpointError, ConfigError, DataError
from braidlora.one_run import train

TEMPLATE = (
    "{{ bos_token }}{% if tools %}tools{% for t in tools %} {{ t.function.name }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %} {{ m.content }}"
    "{% for c in m.tool_calls %}call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}\n{% else %}{{ m.role }}: {{ m.content }}\n{% if mood %}{{ mood }}\n{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "count", "arguments": {"of": "cat"}}}
TOOLS = [{"type": "function", "function": {"name": "count", "description": "counts", "parameters": {}}}]


def chats():
    words = "cat dog cow fox hen owl bear goat".split()
    for at, word in enumerate(words * 2):
        other = words[at // 2]
        yield {
            "messages": [
                *([{"role": "system", "content": "be kind"}] if at % 2 else []),
                {"role": "user", "content": f"say {word}"},
                {"role": "assistant", "content": word},
                {"role": "user", "content": f"say {other} {at}"},
                {"role": "assistant", "content": other},
            ]
        }


@pytest.fixture(scope="module")
def chatter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatter")
    (folder / "t.jinja").write_text(TEMPLATE)
    rows = [*chats()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calling = [
        {
            "messages": [
                {"role": "user", "content": f"how many {n}"},
                {"role": "assistant", "tool_calls": [CALL]},
            ]
        }
        for n in range(6)
    ]
    (folder / "tools.jsonl").write_text(
        "".join(json.dumps({**row, "tools": TOOLS}) + "\n" for row in calling)
    )
    recipe = {
        "model": {"path": "embedded", "chat_template": str(folder / "t.jinja")},
        "adapter": {"r": 2, "num_experts": 2, "target_modules": ["q_proj", "v_proj"]},
        "tasks": [{"name": name, "train": str(folder / f"{name}.jsonl")} for name in ("rows", "tools")],
        "split": {"test": 0.3},
        "prompt": {"cutoff": 96, "chat_template_kwargs": {"mood": "merry"}},
        "evaluation": {"max_new_tokens": 6},
        "training": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 0},
        "output": str(folder / "run"),
    }
    directory = train(RunConfig.model_validate(recipe), progress=False).directory
    (folder / "t.jinja").unlink()  # the adapter has its own copy
    return directory


@pytest.fixture(scope="module")
def by_task(tmp_path_factory):
    """The run of an adapter that has other weights for each of its two tasks."""
    folder = tmp_path_factory.mktemp("by_task")
    (folder / "t.jinja").write_text(TEMPLATE)
    for name, answer in (("cats", "cat cat"), ("dogs", "dog dog")):
        chat = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": answer}]
        (folder / f"{name}.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 12)
    recipe = {
        "model": {"path": "embedded", "chat_template": str(folder / "t.jinja")},
        "adapter": {"method": "mtl-lora", "r": 4, "num_experts": 2, "target_modules": "all-linear"},
        "tasks": [{"name": name, "train": str(folder / f"{name}.jsonl")} for name in ("cats", "dogs")],
        "split": {"test": 0, "validation": 0},
        "prompt": {"cutoff": 48},
        "evaluation": {"max_new_tokens": 6},
        "training": {"max_steps": 12, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 0},
        "output": str(folder / "run"),
    }
    return train(RunConfig.model_validate(recipe), progress=False).directory


def predictions(run, task):
    return [json.loads(line) for line in (run / "predictions" / f"{task}.jsonl").read_text().splitlines()]


def test_evaluation_scores_the_last_turn_and_its_prompts_are_the_templates(chatter):
    lines = predictions(chatter, "rows")
    assert len(lines) == json.loads((chatter / "metrics.json").read_text())["tasks"]["rows"]["n"] >= 4
    for line in lines:
        assert line["reference"] in line["prompt"]
        assert line["prompt"].count("user: ") == 2
        assert line["prompt"].endswith("\nmerry\n")
    assert {line["reference"] for line in predictions(chatter, "tools")} == {'call count {"of": "cat"}'}


def test_predict_answers_labeled_and_unlabeled_chats_as_evaluate_does(chatter, tmp_path, capsys):
    by_prompt = {line["prompt"]: line["prediction"] for line in predictions(chatter, "rows")}
    model = braidlora.load(chatter)
    template = model.task("rows").template
    rows = [row for row in chats() if template.prompt(row, model.tokenizer) in by_prompt]
    wanted = [by_prompt[template.prompt(row, model.tokenizer)] for row in rows]
    assert len(rows) == len(by_prompt)
    assert [line["prediction"] for line in model.predict(rows, "rows")] == wanted
    questions = [{"messages": row["messages"][:-1]} for row in rows]
    assert [line["prediction"] for line in model.predict(questions, "rows")] == wanted
    assert model.generate([row["messages"] for row in questions]) == wanted
    sharegpt = [
        {"conversations": [{"from": "human", "value": "say cat"}]},
        {"conversations": [{"from": "x", "value": "y"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(sharegpt))
    assert main(["predict", str(chatter), "--task", "rows", "--file", str(tmp_path / "rows.json")]) == 3
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["prediction"] == model.predict("say cat", "rows")[0]["prediction"]
    assert "conversations[0]: unknown role 'x'" in second["error"]
    assert "row 2" in err


def test_chat_on_the_command_line_remembers_what_was_said(chatter, monkeypatch, capsys):
    model = braidlora.load(chatter)
    monkeypatch.setattr("sys.stdin", io.StringIO("say cat\n\nsay dog\n"))
    assert main(["generate", str(chatter), "--chat", "--system", "be kind", "--json"]) == 0
    first, second = (json.loads(line)["text"] for line in capsys.readouterr().out.splitlines())
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say cat"}]
    assert first == model.generate(chat)
    chat += [{"role": "assistant", "content": first}, {"role": "user", "content": "say dog"}]
    assert second == model.generate(chat)


@pytest.mark.parametrize("described", [True, False])
def test_a_chat_with_an_adapter_that_has_other_weights_for_each_task(
    by_task, described, tmp_path, monkeypatch, capsys
):
    target = by_task
    if not described:  # PEFT's own files alone, as of an adapter that was trained elsewhere
        target = tmp_path / "adapter"
        target.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(by_task / "adapter" / name, target)
    model = braidlora.load(target, base="embedded")
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    chat, words = [{"role": "user", "content": "say it"}], ["--max-new-tokens=6"]
    answers = {task: model.generate(chat, task, max_new_tokens=6) for task in ("cats", "dogs")}
    assert answers["cats"] != answers["dogs"]
    for task, answer in answers.items():
        prompt = "<s>user: say it\n"
        assert model.generate(prompt, task, raw=True, max_new_tokens=6) == answer
        assert main(["generate", str(target), "--task", task, "--raw", "--prompt", prompt, *words]) == 0
        assert capsys.readouterr().out.rstrip("\n") == answer
        if described:
            monkeypatch.setattr("sys.stdin", io.StringIO("say it\n"))
            assert main(["generate", str(target), "--task", task, "--chat", *words]) == 0
            assert capsys.readouterr().out.rstrip("\n") == answer
    for task, message in ((None, "choose one of cats, dogs"), ("cows", "cats, dogs")):
        with pytest.raises(ConfigError, match=message):
            model.generate(chat, task)


def test_an_empty_answer_does_not_end_a_chat(chatter, monkeypatch, capsys):
    from braidlora.inference.model import Model

    given = []
    monkeypatch.setattr(Model, "generate", lambda self, chat, **options: given.append(list(chat)) or "")
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    assert main(["generate", str(chatter / "adapter"), "--chat"]) == 0
    monkeypatch.undo()
    assert [message["content"] for message in given[1]] == ["a", "", "b"]
    assert isinstance(braidlora.load(chatter).generate(given[1], max_new_tokens=2), str)


def test_chats_from_a_file_with_tools(chatter, tmp_path, capsys):
    chat = {"messages": [{"role": "user", "content": "how many 9"}], "tools": TOOLS}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    (tmp_path / "chats.json").write_text(json.dumps([chat]))
    for name in ("chats.jsonl", "chats.json"):
        assert main(["generate", str(chatter), "--file", str(tmp_path / name), "--max-new-tokens", "8"]) == 0
    model = braidlora.load(chatter)
    text = model.generate(chat, max_new_tokens=8)
    assert capsys.readouterr().out == f"{text}\n{text}\n"
    template = model.task("tools").template
    assert template.prompt(chat, model.tokenizer) == "<s>tools countuser: how many 9\nmerry\n"
    assert text.startswith(model.predict([chat], "tools")[0]["prediction"])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "ends with the assistant's message",
        ),
        ([{"role": "robot", "content": "a"}], r"prompt 1: messages\[0\]: unknown role 'robot'"),
        ({"messages": []}, "prompt 1: the column 'messages' needs a list of messages; got an empty list"),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": 3},
            "the column 'tools': expected a list of tools",
        ),
    ],
)
def test_chats_that_cannot_be_answered(chatter, chat, message):
    with pytest.raises(DataError, match=message):
        braidlora.load(chatter).generate(chat)


def test_another_base_is_named_with_the_option_of_the_command(chatter, capsys):
    from helpers.data import data_path

    base = str(data_path("models", "stories260K"))
    with pytest.raises(CheckpointError, match=r"trained on a different base model(.|\n)*with --base PATH\."):
        braidlora.load(chatter / "adapter", base=base)
    assert main(["predict", str(chatter), "--task", "rows", "--text", "a", "--base", base]) == 5
    assert "Give the base it was trained on with --base PATH." in capsys.readouterr().err


def test_evaluate_uses_the_recorded_template(chatter, capsys):
    before = (chatter / "metrics.json").read_text()
    assert main(["evaluate", str(chatter)]) == 0
    assert json.loads((chatter / "metrics.json").read_text())["tasks"] == json.loads(before)["tasks"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; expected a file with a Jinja template"),
        (b"", "is empty; expected a Jinja template"),
        (b"hello", "is not a chat template; it does not use `messages`"),
        (b"\xff\xfe", "cannot be read: not UTF-8 text"),
        (b"{% for m in messages %}", "rejects this chat: TemplateSyntaxError"),
    ],
)
def test_a_chat_template_that_cannot_be_used(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    (tmp_path / "rows.jsonl").write_text(json.dumps(next(chats())) + "\n")
    (tmp_path / "r.yaml").write_text(
        f"model: {{chat_template: {tmp_path / 't.jinja'}}}\ntasks:\n  - {{name: t, train: {tmp_path / 'rows.jsonl'}}}\n"
    )
    assert main(["preview", str(tmp_path / "r.yaml")]) in (2, 3)
    assert message in capsys.readouterr().err
