"""`preview`: marked tokens, counts, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import sys

import pytest
from task_helpers import byte_level_tokenizer, config_of, questions

from braidlora.config import RunConfig
from braidlora.errors import ConfigError, DataWarning
from braidlora.models.tokenizer import load_tokenizer
from braidlora.tasks.preview import preview


def shown(config, **options):
    return preview(config, load_tokenizer(config.model), **options)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    byte_level_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


@pytest.fixture
def recipe(base, rows_file):
    def make(rows, *, task=None, **sections):
        return config_of(rows_file(rows), task=task, model={"path": base}, **sections)

    return make


def test_tokens_with_loss_are_marked(recipe):
    text = shown(recipe([{"instruction": "Say yes.", "output": "yes"}], prompt={"template": "alpaca_short"}))
    assert "### Instruction:\n     Say yes.\n     \n     ### Response:\n     ⟦yes<|end|>⟧" in text
    assert "drawn 100.0% of the time, 1 rows per epoch" in text
    assert "\x1b" not in text


def test_with_train_on_prompt_all_but_the_first_token_is_marked(recipe):
    prompt = {"template": "{instruction}", "train_on_prompt": True}
    text = shown(recipe([{"instruction": "Q?", "output": "A"}], prompt=prompt))
    assert "     Q⟦?A<|end|>⟧" in text


def test_on_a_terminal_marks_are_bold_and_control_characters_are_shown_not_sent(recipe, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    config = recipe(
        [{"instruction": "clear \x1b[2J", "output": "a\x07b"}], prompt={"template": "{instruction}\n"}
    )
    text = shown(config)
    assert "\x1b[1;4ma\\x07b<|end|>\x1b[0m" in text
    assert "clear \\x1b[2J" in text
    assert "\x1b[2J" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦a\\x07b<|end|>⟧" in shown(config)


def test_the_dictionary_is_json_and_agrees_with_the_encoding(recipe):
    result = json.loads(json.dumps(shown(recipe(questions(9)), rows=3, as_json=True)))
    assert (result["kind"], result["rows_per_epoch"], result["cutoff"]) == ("generate", 9, 256)
    task = result["tasks"]["t"]
    assert (task["probability"], task["draws_per_epoch"], task["metric"]) == (1.0, 9, "exact_match")
    assert len(task["examples"]) == 3
    for example in task["examples"]:
        assert len(example["tokens"]) == len(example["token_ids"]) == len(example["loss"])
        assert example["loss"][-1]
        assert not example["loss"][0]
        assert [part["loss"] for part in example["parts"]] == [False, True]
        assert example["parts"][1]["text"].startswith("answer ")


def test_truncated_dropped_skipped_and_leaked_rows_are_told(recipe, rows_file):
    rows = [
        {"instruction": "long " * 99, "output": "yes"},
        {"instruction": "x", "output": "yes " * 99},
        {"a": 1},
    ]
    prompt = {"cutoff": 50, "bad_rows": "skip"}
    test = rows_file([{"instruction": "x", "output": "y"}], "test.jsonl")
    with pytest.warns(
        DataWarning, match=r"prompt\.cutoff=50 is too short for its 2 rows: 1 dropped .*, 1 cut"
    ):
        text = shown(recipe(rows, task={"test": test}, prompt=prompt))
    assert "1 truncated, 1 dropped" in text
    assert "train: 1 bad rows skipped; the first: " in text
    assert "1 test prompts are also in the training rows" in text


def test_classify_shows_the_label_and_a_tested_only_task_says_so(base, rows_file):
    train = rows_file([{"text": "fine", "label": "good"}, {"text": "poor", "label": "bad"}])
    tasks = [
        {"name": "mood", "kind": "classify", "train": train},
        {"name": "later", "kind": "classify", "test": train},
    ]
    text = shown(RunConfig.model_validate({"tasks": tasks, "model": {"path": base}}))
    assert "labels bad, good" in text
    assert "     fine → ⟦good⟧" in text
    assert "no training rows; this task is only tested" in text


def test_a_base_without_a_tokenizer_is_a_config_error(tmp_path, recipe):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    config = recipe(questions(2))
    section = config.model.model_copy(update={"path": str(tmp_path / "empty")})
    with pytest.raises(ConfigError, match=r"model\.path: the tokenizer of .*empty cannot be loaded"):
        load_tokenizer(section)
