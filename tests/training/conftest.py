"""A tiny base, tiny tasks, and whole runs in processes of their own, forked from one that has torch imported."""

import gc
import multiprocessing
import os

import pytest
import torch
from training_child import Outcome, run_child
from training_models import build_base, write_rows

from braidlora.config import RunConfig

# One thread, as in the child processes: sums depend on the number of threads.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _small_heap():
    """Every run collects garbage once; what the imports left on the heap need not be walked each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """Nothing here pulls the plug, so in this process nothing waits for the disk; the killed ones do."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def make_config(tiny_base, rows, tmp_path):
    """A checked recipe over the tiny base and tasks; keyword arguments are dotted overrides with `__` for the dot."""

    def make(output="run", *, kind="generate", **overrides):
        suffix = "" if kind == "generate" else "-labels"
        recipe = {
            "model": {"path": str(tiny_base)},
            "adapter": {"r": 4, "num_experts": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
            "tasks": [
                {"name": name, "kind": kind, "train": str(rows / f"{name}{suffix}.jsonl")}
                | ({"max_new_tokens": 4} if kind == "generate" else {})
                for name in ("up", "rev", "len")
            ],
            "split": {"test": 0.1},
            "prompt": {"cutoff": 24} | ({"template": "{instruction}:{input}->"} if kind == "generate" else {}),
            "training": {
                "epochs": 2, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2, "save_steps": 4,
                "logging_steps": 3,
            },
            "seed": 1,
            "output": str(tmp_path / output),
        }  # fmt: skip
        for dotted, value in overrides.items():
            node = recipe
            *path, last = dotted.split("__")
            for key in path:
                node = node.setdefault(key, {})
            node[last] = value
        return RunConfig.model_validate(recipe)

    return make


@pytest.fixture(scope="session")
def in_child():
    """Call `train` in a process of its own and wait: `in_child(config, resume="auto", …)` → Outcome."""
    context = multiprocessing.get_context("forkserver")
    # Modules of installed packages: the server that forks does not know pytest's import paths yet.
    context.set_forkserver_preload(
        [
            "braidlora.train",
            "transformers.models.llama.modeling_llama",
            "transformers.models.bert.modeling_bert",
        ]
    )

    def call(config: RunConfig, timeout=120, while_running=None, **options) -> Outcome:
        return run_child(context, config, timeout, while_running, options)

    return call
