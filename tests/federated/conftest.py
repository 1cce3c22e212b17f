"""A tiny base, rows of three clients, and recipes over them."""

import pytest
from spoiled import spoiled_step

from braidlora.federated.simulation import runner
from helpers.child import child_runner
from helpers.recipes import federated_config
from helpers.tiny_base import build_base, write_rows


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base"), hidden=32, intermediate=48, layers=1, heads=2)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), (24, 16, 10), lengths=False)


@pytest.fixture(scope="session")
def even_rows(tmp_path_factory):
    """24, 16 and 8 training rows: whole steps of 8, so that none of two processes has to repeat rows to fill one."""
    return write_rows(tmp_path_factory.mktemp("even"), (30, 20, 10), lengths=False)


@pytest.fixture
def make_config(tiny_base, rows, tmp_path):
    """A checked recipe: `make_config("run", rule="flora", ranks=[2, 4, 3], training__batch_size=4)`."""

    def make(output="run", **overrides):
        return federated_config(tiny_base, rows, tmp_path / output, **overrides)

    return make


@pytest.fixture(scope="session")
def in_child():
    """Call `federate` in a child process and wait: `in_child(config, resume="auto", …)` → Outcome."""
    return child_runner("federate")


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(name, how, rounds)`: what `client_step` returns for a client in some rounds goes through `how` first."""
    wrong = {}
    monkeypatch.setattr(runner, "client_step", spoiled_step(wrong))
    return lambda name, how, rounds=(1, 2): wrong.setdefault(name, []).append((how, rounds))
