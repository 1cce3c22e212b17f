"""Fixtures of a tiny base, tiny tasks, and recipes over them; a conftest imports those that its room needs."""

import pytest

from helpers.recipes import run_config
from helpers.tiny_base import build_base, write_rows


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def make_config(tiny_base, rows, tmp_path):
    """A checked recipe: `make_config("run", kind="classify", training__batch_size=4)`."""

    def make(output="run", **overrides):
        return run_config(tiny_base, rows, tmp_path / output, **overrides)

    return make
