"""Runs, a federation and a classifier, each barely trained, and the command line in this process."""

import json
import warnings

import pytest

from braidlora.cli import main
from braidlora.config import RunConfig
from braidlora.federated.simulation.driver import federate
from braidlora.one_run import train
from helpers.recipes import federated_config
from helpers.tiny_base import build_base, write_rows


def _trained(folder, method, **adapter):
    recipe = {
        "model": {"path": "embedded"},
        "adapter": {"method": method, "r": 2, "target_modules": ["q_proj", "v_proj"], **adapter},
        "tasks": [
            {
                "name": name,
                "train": {"source": f"generated:{name}", "limit": 24},
                "test": {"source": f"generated:{name}", "limit": 9},
            }
            for name in ("rising", "mood")
        ],
        "prompt": {"template": "{instruction} =", "cutoff": 48},
        "evaluation": {"max_new_tokens": 8},
        "training": {"max_steps": 2, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 0},
        "output": str(folder / method),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(RunConfig.model_validate(recipe), progress=False).directory


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The directories of two runs on the embedded base, by method."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "alora": _trained(folder, "alora", num_experts=3),
        "lora": _trained(folder, "lora"),
    }


@pytest.fixture(scope="session")
def federation(tmp_path_factory):
    """A finished federation of three clients on a base of its own."""
    base = build_base(tmp_path_factory.mktemp("base"), hidden=32, intermediate=48, layers=1, heads=2)
    rows = write_rows(tmp_path_factory.mktemp("rows"), (24, 16, 10), lengths=False)
    config = federated_config(base, rows, tmp_path_factory.mktemp("fed") / "fed", rounds=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        federate(config, progress=False)
    return config.output


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The run of a classifier, whose adapter has a head."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [
        {"text": word, "label": "long" if len(word) > 3 else "short"}
        for word in ("a bb ccc dddd eeeee " * 4).split()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": "embedded"},
        "adapter": {"r": 2, "num_experts": 2, "target_modules": ["q_proj"]},
        "tasks": [{"name": "size", "kind": "classify", "train": str(folder / "rows.jsonl")}],
        "prompt": {"cutoff": 16},
        "split": {"test": 0.2},
        "training": {"max_steps": 2, "batch_size": 4, "warmup_steps": 0},
        "output": str(folder / "run"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(RunConfig.model_validate(recipe), progress=False).directory


@pytest.fixture
def command(capsys):
    """`command("serve", RUN, …)` → (exit code, standard output, standard error)."""

    def run(*words):
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    """No key from the environment of whoever runs the tests."""
    monkeypatch.delenv("BRAIDLORA_API_KEY", raising=False)
