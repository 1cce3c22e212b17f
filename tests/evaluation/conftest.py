"""Fixtures of the evaluation tests: models and recipes."""

import json
from pathlib import Path

import pytest
import yaml
from evaluation_models import make_model, make_tokenizer, rows

from helpers.data import data_path


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def stories():
    """A real pretrained model: 260K parameters, trained on TinyStories."""
    folder = data_path("models", "stories260K")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, base_folder) -> Path:
    """Two `generate` tasks with 11 and 5 test rows, one with an extractor and options."""
    for name, data in (("train", rows(12)), ("test", rows(11, 100)), ("few", rows(5, 200))):
        (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    source = {"train": str(tmp_path / "train.json")}
    content = {
        "model": {"path": str(base_folder)},
        "prompt": {"template": "{instruction}: {input}?\n", "cutoff": 64},
        "tasks": [
            {
                "name": "sums", **source, "test": str(tmp_path / "test.json"), "extract": "number",
                "options": ["1", "23"],
            },
            {
                "name": "text", **source, "test": str(tmp_path / "few.json"), "metric": "rouge1",
                "columns": {"answer": "output"}, "options": ["so 1", "so 23"],
            },
        ],
        "evaluation": {"batch_size": 4, "max_new_tokens": 6},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
