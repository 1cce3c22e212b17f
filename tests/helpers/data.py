"""The datasets and models below `BRAIDLORA_DATA`; a test that needs them is skipped where they are absent."""

import os
from pathlib import Path

import pytest

from braidlora import catalog
from braidlora.models.hub_copies import COPIES
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
    for task in config.tasks:
        for part in ("train", "test"):
            source = getattr(task, part)
            if source is not None and source.source.startswith(catalog.PREFIX):
                key = source.source.removeprefix(catalog.PREFIX)
                file = catalog.data_set(key).parts[source.split or part].file
                if catalog.find(catalog.data_file(file)) is None:
                    data_path(*file.split("/"))
                    pytest.skip(f"{file} is absent")
    if config.model.path.startswith("models/") and not find_data(config.model.path).exists():
        pytest.skip(f"{config.model.path} is absent")
    if config.model.path in COPIES and not stand_in(config):
        name = COPIES[config.model.path].path.removeprefix("package:").split("/")[0]
        pytest.importorskip(name, reason=f"the base model: {COPIES[config.model.path].install}")


def stand_in(config) -> list[str]:
    """Overrides that replace a base from the hub by the embedded one, unless a small copy of it is a package."""
    light = config.model.path in ("embedded", "sentence-transformers/all-MiniLM-L6-v2")
    if light or config.model.path.startswith("models/"):
        return []
    if any(
        task.name == "gsm8k" for task in config.tasks
    ):  # whose solutions are too long for the embedded one
        data_path("models", "stories260K")
        return ["--model.path=models/stories260K", "--prompt.cutoff=384"]
    return ["--model.path=embedded", "--prompt.cutoff=128"]
