"""A tiny base, tiny tasks, and recipes over them; runs in child processes."""

import pytest

from helpers.child import child_runner
from helpers.fixtures import make_config, rows, tiny_base  # noqa: F401


@pytest.fixture(scope="session")
def in_child():
    """Call `train` in a child process and wait: `in_child(config, resume="auto", …)` → Outcome."""
    return child_runner("train")
