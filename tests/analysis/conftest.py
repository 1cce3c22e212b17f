"""Adapters written by hand, and a few runs of a tiny base that all tests share."""

import pytest

from braidlora.config import RunConfig
from braidlora.one_run import train
from helpers.tiny_base import build_base, write_rows


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with a random base of two layers (`base`) and three tasks (`rows`)."""
    root = tmp_path_factory.mktemp("material")
    build_base(root / "base")
    (root / "rows").mkdir()
    write_rows(root / "rows")
    return root


@pytest.fixture(scope="session")
def recipe(material):
    """A recipe over it as plain data; keyword arguments replace sections."""

    def make(**sections):
        return {
            "model": {"path": str(material / "base")},
            "adapter": {"r": 4, "num_experts": 3, "target_modules": ["q_proj", "v_proj"]},
            "tasks": [
                {"name": name, "train": str(material / "rows" / f"{name}.jsonl"), "max_new_tokens": 4}
                for name in ("up", "rev", "len")
            ],
            "split": {"test": 0.1},
            "prompt": {"cutoff": 24, "template": "{instruction}:{input}->"},
            "training": {
                "max_steps": 12, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 3, "save_steps": 4,
                "logging_steps": 4,
            },
            "seed": 1,
            **sections,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def runs(recipe, tmp_path_factory):
    """A finished run of a method, by name, with other settings of its adapter; trained when first asked for."""
    root = tmp_path_factory.mktemp("runs")

    def get(method, **settings):
        folder = root / "-".join([method, *(f"{key}={value}" for key, value in settings.items())])
        if not folder.is_dir():
            made = recipe()
            made["adapter"] = {**made["adapter"], "method": method, **settings}
            train(RunConfig.model_validate({**made, "output": str(folder)}), progress=False)
        return folder

    return get
