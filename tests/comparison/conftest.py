"""A recipe of three tiny tasks on a tiny base, as a file, and a comparison of it that is made once."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from comparison_files import WORDS

from braidlora.cli import main
from helpers.tiny_base import build_base, write_rows


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """Three tasks of a few answers to choose from, and twelve steps a run."""
    folder = tmp_path_factory.mktemp("comparison")
    build_base(folder / "base")
    write_rows(folder)
    options = {"up": ["yes", "no"], "rev": ["yes", "no"], "len": ["2", "3", "4", "5"]}
    content = {
        "model": {"path": str(folder / "base")},
        "adapter": {"r": 4, "num_experts": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
        "tasks": [
            {
                "name": name, "train": str(folder / f"{name}-labels.jsonl"), "options": options[name],
                "columns": {"instruction": "text", "output": "label"},
            }
            for name in options
        ],
        "split": {"test": 0.4, "validation": 0.1},
        "prompt": {"template": "{instruction}->", "cutoff": 24},
        "training": {
            "max_steps": 12, "batch_size": 16, "learning_rate": 0.01, "warmup_steps": 2, "save_steps": 6,
            "eval_steps": 6,
        },
        "evaluation": {"batch_size": 64, "mode": "rank"},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory) -> Path:
    """Four rows, two seeds, single-task LoRAs: the folder of a finished comparison, not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert main(["compare", str(recipe), "--workers=1", "--no-report", f"--output={folder}", *WORDS]) == 0
    return folder


@pytest.fixture
def compare(recipe, capsys):
    """`braidlora compare` on the tiny recipe: `compare(folder, "--seeds=0", …)`; serial, so that it is quick."""

    def call(output: Path, *words: str, source: Path = recipe) -> Outcome:
        code = main(["compare", str(source), "--workers=1", "--no-report", f"--output={output}", *words])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Outcome(code, printed.out, printed.err)

    return call
