"""Whether what a user names is here at all: a run, an adapter, a model. Imports no torch, so a typo shows at once."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path

from braidlora.errors import ConfigError
from braidlora.hub_access import check_hub
from braidlora.models.hub_copies import is_hub_name
from braidlora.models.package import PACKAGE
from braidlora.paths import expanded, find_data, places_searched
from braidlora.runs import BASE_CONFIG, CELLS, run_around

EMBEDDED, GGUF = "embedded", ".gguf"
_LISTED = 12  # runs in a message
_TIMEOUT = 10.0  # seconds for the hub to answer


def refuse_missing(given: str | Path) -> None:
    """Raise ConfigError, with the runs that are there, if `given` is neither on this machine nor a model of the hub.

    `runs/NAME` has the form of a hub name as well; where there is a folder `runs`, it is meant.
    """
    given, path = str(given), expanded(given)
    if path.exists() or find_data(given).exists() or given == EMBEDDED or given.startswith(PACKAGE):
        return
    parent = path.parent
    local = parent != Path(".") and parent.is_dir()
    known = is_hub_name(given) or _is_one_word_on_hub(given)
    if known and not local and not given.endswith(GGUF) and parent.name != "runs":
        return
    there = sorted(one.name for one in parent.iterdir() if one.is_dir()) if parent.is_dir() else []
    there = [name for name in there if run_around(parent / name) or (parent / name / CELLS).is_dir()]
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(str(parent / name) for name in near)}?" if near else ""
    if not near and there:
        hint = f" The runs there are {', '.join(there[:_LISTED])}{', …' if there[_LISTED:] else ''}."
    where = f"in {parent.absolute()}" if parent.is_dir() else f"; there is no folder {parent.absolute()}"
    kind = "file" if given.endswith(GGUF) else "run, adapter or model"
    raise ConfigError(f"{given}: no such {kind}{' ' if parent.is_dir() else ''}{where}.{hint}")


def refuse_unknown_model(path: str) -> None:
    """Raise ConfigError if a `model.path` of one word is neither a folder nor a model of the hub, such as `gpt2`."""
    if "/" not in path and not _is_one_word_on_hub(path):
        raise ConfigError(
            f"model.path: no model {path!r}: there is no such folder ({places_searched(path)}), and the hub, or its "
            "cache where it cannot be reached, has no model of this name. Expected a folder, a hub name (owner/name), "
            "a .gguf file, `embedded`, or `package:NAME/folder`."
        )


def refuse_missing_base(target: str | Path, path: str, remedy: str) -> None:
    """Raise ConfigError if the base that an adapter names by a local path is not here, as on another machine.

    Args:
        target: the adapter or run.
        path: the `model.path` that it records.
        remedy: how to say where the base is now, such as `--base PATH`.
    """
    local = path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(GGUF)
    if local and not path.startswith(PACKAGE) and not find_data(path).exists():
        raise ConfigError(
            f"{target}: was trained on the base model {path}, which is not on this machine ({places_searched(path)}). "
            f"Say where it is with {remedy}; it is compared with the one that the adapter was trained on."
        )


def _is_one_word_on_hub(given: str) -> bool:
    """Whether it is a name without an owner, as a few old models have (`gpt2`), and the hub or its cache has it."""
    return "/" not in given and not given.startswith(".") and not given.endswith(GGUF) and _on_hub(given)


@functools.cache
def _on_hub(name: str) -> bool:
    check_hub()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        hf_hub_download(name, BASE_CONFIG, etag_timeout=_TIMEOUT)
    except GatedRepoError:
        return True  # loading explains how to get access
    except (LocalEntryNotFoundError, RepositoryNotFoundError, ValueError):
        return False  # not cached and out of reach; unknown; or not a name at all
    except HfHubHTTPError:
        return True
    except OSError:
        return False
    return True
