"""A stranger's `braidlora.json` is data: it can neither run code, read anything, nor fill the memory."""

import json
import shutil
import sys

import pytest

import braidlora
from braidlora.errors import BraidloraError, CheckpointError, ConfigError, DataError
from braidlora.models.model_card import merged_card, model_card
from braidlora.runs import MANIFEST, AdapterCard

TEMPLATES = {
    "attribute": "{text.__class__.__mro__}",
    "index": "{text[0]}",
    "other field": "{label} {text}",
    "position": "{0} {text}",
    "conversion": "{text!r}",
    "width": "{text:>1000000000}",
    "nested width": "{text:{text}}",
    "many fields": "{text}" * 1000,
    "no field": "nothing",
    "not a format": "{text",
}


def changed(folder, tmp_path, change):
    """A copy of an adapter folder with another card, as a stranger may send it."""
    away = shutil.copytree(folder, tmp_path / "away")
    (away / MANIFEST).unlink(missing_ok=True)
    card = json.loads((away / "braidlora.json").read_text())
    change(card)
    (away / "braidlora.json").write_text(json.dumps(card))
    return away


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_only_inserts_fields(name, classifier, tmp_path):
    def change(card):
        card["tasks"][0]["template"]["with_input"] = TEMPLATES[name]

    away = changed(classifier / "adapter", tmp_path, change)
    with pytest.raises(CheckpointError, match=r"braidlora\.json: task topic: template: "):
        braidlora.load(away)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_chat_template_runs_in_the_sandbox(template, writer, tmp_path):
    def change(card):
        card["prompt"]["chat_template"] = template
        for task in card["tasks"]:
            task["template"] |= {"chat": True}

    model = braidlora.load(changed(writer / "adapter", tmp_path, change))
    with pytest.raises(
        DataError, match=r"chat template rejects this chat: (SecurityError|UndefinedError|OverflowError)"
    ):
        model.predict("1 2", "rising")


def test_a_base_with_its_own_code_is_refused(writer, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (base / "config.json").write_text(
        json.dumps(
            {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        )
    )

    def change(card):
        card["base"]["path"] = str(base)

    with pytest.raises(BraidloraError):
        braidlora.load(changed(writer / "adapter", tmp_path, change))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("prompt", "cutoff"), 2**40),
        (("answers", "batch_size"), 2**30),
        (("answers", "max_new_tokens"), 0),
        (("answers", "num_beams"), -1),
        (("prompt", "chat_template"), "x" * (1 << 21)),
        (("tasks", 0, "template", "with_input"), "{text}" + "x" * (1 << 17)),
        (("tasks", 0, "name"), "a\x1b[2Jb"),
        (("tasks", 0, "options"), ["a"]),
        (("base", "path"), "a\nb"),
    ],
)
def test_sizes_and_names_are_bounded(path, value, classifier, tmp_path):
    def change(card):
        node = card
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    away = changed(classifier / "adapter", tmp_path, change)
    with pytest.raises(CheckpointError, match="not valid"):
        braidlora.load(away)


def test_an_answer_longer_than_the_model_reads_is_refused(writer, tmp_path):
    def change(card):
        card["answers"]["max_new_tokens"] = 2**24

    model = braidlora.load(changed(writer / "adapter", tmp_path, change))
    with pytest.raises(ConfigError, match="leave no room for a prompt"):
        model.predict("1 2", "rising")


def test_what_a_label_says_is_escaped_on_the_terminal(classifier, tmp_path):
    """Labels are any text; a terminal is not moved or recolored by them."""
    import subprocess

    def change(card):
        for task in card["tasks"]:
            task["labels"] = [f"\x1b[31m{label}" for label in task["labels"]]
        card["labels"] = [f"\x1b[31m{label}" for label in card["labels"]]

    away = changed(classifier / "adapter", tmp_path, change)
    done = subprocess.run(
        [sys.executable, "-m", "braidlora", "predict", str(away), "--task=tone", "--text=abc"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\x1b" not in done.stdout
    assert json.loads(done.stdout)["prediction"].startswith("\x1b[31m")


def test_nothing_of_a_card_becomes_markup_or_code():
    nasty = 'x"\n```\n---\nimport os # [a](javascript:b) <script>'
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": nasty, "r": 2}
    card = AdapterCard.model_validate(
        {
            "braidlora": "0",
            "labels": [nasty, "b"],
            "prompt": {"cutoff": 8},
            "tasks": [
                {
                    "name": "``` <script> [a](b)", "kind": "classify", "labels": [nasty, "b"], "indices": [0, 1],
                    "template": {"name": nasty, "with_input": nasty, "without_input": nasty},
                },
                {
                    "name": "other", "kind": "classify", "labels": ["b", nasty], "indices": [1, 0],
                    "template": {"name": nasty, "with_input": nasty, "without_input": nasty},
                },
            ],
        }
    )  # fmt: skip
    for text in (model_card(config, card), merged_card(config, card)):
        assert text.count("\n```") == 2  # one block of code
        assert text.count("\n---\n") == 1
        outside = text.partition("```python")[0].partition("\n---\n")[2] + text.rpartition("```")[2]
        assert not set("<>[]") & set(outside)
        code = text.partition("```python\n")[2].partition("\n```")[0]
        compile(code, "README.md", "exec")
        assert "import os" not in [line.strip() for line in code.split("\n")]
