"""Tests that need Flower; the helpers are in deployments.py."""

import importlib.util
import os
import shutil
import socket
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    missing = [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.flower)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)} (braidlora[fed])"))


@pytest.fixture(scope="session")
def open_folder(tmp_path_factory):
    """A folder that other users can reach, which pytest's own are not."""
    folder = Path("/tmp") / f"braidlora-flower-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def free_port():
    """`free_port()`: the first of ten ports that nobody listens on."""
    taken = [29_400]

    def find():
        while True:
            taken[0] += 10
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", taken[0])):
                    return taken[0]

    return find
