"""A tiny base and recipes over it, in this process and in processes of their own."""

import gc
import multiprocessing
import os

import pytest
import torch
from federation_child import run_child
from federation_models import build_base, federated_config, write_rows

torch.set_num_threads(1)  # sums depend on it, and child processes have one


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def make_config(tiny_base, rows, tmp_path):
    """A checked recipe: `make_config("run", rule="flora", ranks=[2, 4, 3], training__batch_size=4)`."""

    def make(output="run", **overrides):
        return federated_config(tiny_base, rows, tmp_path / output, **overrides)

    return make


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """Nothing here pulls the plug, so nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session", autouse=True)
def _small_heap():
    """Every federation collects garbage once; what the session left on the heap need not be walked each time."""
    gc.freeze()
    patch = pytest.MonkeyPatch()
    patch.setattr(gc, "unfreeze", lambda: None)
    yield
    patch.undo()
    gc.unfreeze()


@pytest.fixture(scope="session")
def in_child():
    """Call `federate` in a process of its own and wait: `in_child(config, resume="auto", …)` → Outcome."""
    context = multiprocessing.get_context("forkserver")
    # Modules of installed packages: the server that forks does not know pytest's import paths yet.
    context.set_forkserver_preload(
        [
            "braidlora.train",
            "braidlora.federated.simulation.driver",
            "transformers.models.llama.modeling_llama",
            "transformers.models.bert.modeling_bert",
        ]
    )

    def call(config, timeout=240, while_running=None, **options):
        return run_child(context, config, timeout, while_running, options)

    return call
