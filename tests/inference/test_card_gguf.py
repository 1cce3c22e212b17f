"""The code in the README of a plain LoRA on a GGUF base answers as `predict`, in a process without braidlora."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

import braidlora
from helpers.tiny_gguf import build_gguf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the package gguf (pip install 'braidlora[gguf]')"
)
BLOCKER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "braidlora":
            raise ImportError("braidlora is not installed here")
sys.meta_path.insert(0, Blocked())
"""


def test_a_plain_lora_on_a_gguf_base_needs_peft_and_transformers_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_gguf(tmp_path / "tiny.gguf")
    rows = [{"instruction": f"up {n}", "output": "re" * n} for n in range(1, 9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "model": {"path": str(tmp_path / "tiny.gguf")},
        "adapter": {"method": "lora", "target_modules": "all-linear"},
        "tasks": [{"name": "one", "train": str(tmp_path / "rows.json")}],
        "prompt": {"template": "chat", "cutoff": 48},
        "training": {"max_steps": 6, "batch_size": 4, "learning_rate": 0.02, "warmup_steps": 0},
        "evaluation": {"max_new_tokens": 6},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    run = braidlora.train(tmp_path / "recipe.yaml", progress=False).directory
    (answer,) = braidlora.load(run).predict([{"instruction": "up 3"}], task="one")
    (code,) = re.findall(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), flags=re.S)
    code = code.replace("PATH_OF_THIS_FOLDER", str(run / "adapter")).replace("YOUR INSTRUCTION", "up 3")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKER + code], capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer["prediction"]
    assert answer["prediction"]  # something to compare
