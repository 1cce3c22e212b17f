"""`verify`: check a directory against its manifest and those of all folders below it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError
from braidlora.runs._files import is_leftover
from braidlora.runs._flock import is_locked
from braidlora.runs._lock import holder_of, is_lock
from braidlora.runs._manifest import MANIFEST, check_file, read_manifest
from braidlora.runs._names import (
    ADAPTER_CONFIG,
    ENVIRONMENT,
    IDENTITY,
    LOG,
    METRICS,
    MODEL_CARD,
    RECIPE,
    ROLLED_BACK,
)

# File that identifies the kind of a folder; the first match counts.
_KINDS = (
    ("comparison.json", "comparison"),
    ("recipe.yaml", "comparison"),
    ("experiment.json", "federation"),
    ("export.json", "export"),
    (IDENTITY, "checkpoint"),
    ("server.json", "round of a federation"),
    ("state.safetensors", "state of a client"),
    (ADAPTER_CONFIG, "adapter"),
    (RECIPE, "run"),
    ("analysis.json", "analysis"),
    (METRICS, "evaluation"),
)
_FINISHED_BY = {"run": METRICS, "federation": METRICS, "comparison": "comparison.json"}
# Kinds that are written atomically: without a manifest such a folder is incomplete.
_COMMITTED = ("export", "checkpoint", "round of a federation", "state of a client")
_LAST = (METRICS, "added.json", "cell.json")  # written last; their entries are written before them
_GROWING = (LOG, "rounds.jsonl", "privacy.jsonl")  # until the run is finished
# Not covered: a card may be edited, pages and figures are drawn again, errors are appended, sites are removed from the
# list of those that have yet to follow a rollback, and a lock holds no data.
_FREE_FILES = (MODEL_CARD, "report.html", "demo.json", "errors.log", ROLLED_BACK, MANIFEST)
_FREE_FOLDERS = ("figures",)
_LOOKS, _PAUSE = 2, 0.2  # further passes if something seems damaged, and the pause before each in seconds


def verify(directory: Path) -> dict[str, Any]:
    """Check every file of a directory and its subdirectories against their manifests. Changes nothing.

    Returns:
        `{"directory", "what", "intact", "damaged": [{"file", "problem"}], "not_covered", "unfinished", "holder"}`: the
        number of intact files; missing and changed files, with the reason; files that no manifest lists, as in
        directories of version 0.1; unfinished folders; and the process that is writing there now, or None.

    Raises:
        CheckpointError: the folder does not exist, or nothing in it was written by braidlora.
    """
    try:
        there, kind = directory.is_dir(), _kind(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}.") from None
    if not there:
        raise CheckpointError(f"{directory}: no such folder.")
    found = _Findings(directory)
    for _ in range(_LOOKS):
        if not found.damaged:
            break
        # What a live process was replacing or removing is complete or gone in the next pass; damage remains.
        time.sleep(_PAUSE)
        again = _Findings(directory)
        again.damaged = {name: problem for name, problem in again.damaged.items() if name in found.damaged}
        found = again
    what = kind or "folder"
    if not found.intact and not found.damaged and not found.not_covered and not found.unfinished:
        raise CheckpointError(
            f"{directory}: nothing to verify; expected a directory that braidlora wrote, such as a run or an adapter."
        )
    return {
        "directory": str(directory),
        "what": what,
        "intact": found.intact,
        "damaged": [{"file": name, "problem": problem} for name, problem in sorted(found.damaged.items())],
        "not_covered": sorted(found.not_covered),
        "unfinished": sorted(set(found.unfinished)),
        "holder": holder_of(directory),
    }


class _Findings:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.intact = 0
        self.damaged: dict[str, str] = {}
        self.not_covered: list[str] = []
        self.unfinished: list[str] = []
        self.look(root)

    def look(self, folder: Path, vouched: frozenset[Path] = frozenset(), *, ours: bool = False) -> None:
        """Check `folder` and everything below it.

        Args:
            vouched: files listed in the manifest of a folder above.
            ours: whether the folder is in a directory that braidlora wrote.
        """
        try:
            self._check(folder, vouched, ours)
        except FileNotFoundError:  # a live process has removed it
            return
        except OSError as error:
            self.damaged[self._name(folder)] = f"{folder}: cannot be read: {error.strerror}."

    def _check(self, folder: Path, vouched: frozenset[Path], ours: bool) -> None:
        files = self._manifest(folder)
        kind = _kind(folder)
        finished_by = _FINISHED_BY.get(kind or "")
        unfinished = finished_by is not None and not (folder / finished_by).is_file()
        if unfinished:
            self.unfinished.append(self._name(folder))
        listed = set()
        for name, entry in (files or {}).items():
            if name.rpartition("/")[2] in _LAST and not (folder / name).exists():
                self.unfinished.append(self._name((folder / name).parent))
                continue
            listed.add(folder / name)
            try:
                check_file(folder / name, entry)
            except CheckpointError as error:
                self.damaged[self._name(folder / name)] = str(error)
            else:
                self.intact += 1
        vouched, ours = vouched | listed, ours or kind is not None or files is not None
        for entry_path in sorted(folder.iterdir()):
            name = entry_path.name
            if is_lock(name) or is_leftover(name) or entry_path in vouched or entry_path.is_symlink():
                if is_leftover(name) and not is_locked(entry_path):
                    self.unfinished.append(self._name(entry_path))
            elif entry_path.is_dir():
                if name not in _FREE_FOLDERS:
                    self.look(entry_path, vouched, ours=ours)
            elif name not in _FREE_FILES and ours:
                if unfinished and name in _GROWING:
                    continue
                self.not_covered.append(self._name(entry_path))

    def _manifest(self, folder: Path) -> dict[str, dict[str, Any]] | None:
        if not (folder / MANIFEST).exists():
            if _kind(folder) in _COMMITTED or (_kind(folder) == "adapter" and _in_a_run(folder)):
                self.damaged[self._name(folder)] = (
                    f"{folder}: {MANIFEST} is missing, so the folder is incomplete."
                )
            return None
        try:
            return read_manifest(folder)
        except CheckpointError as error:
            self.damaged[self._name(folder / MANIFEST)] = str(error)
            return None

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.root)


def _kind(folder: Path) -> str | None:
    for marker, kind in _KINDS:
        if (folder / marker).is_file():
            return kind
    return None


def _in_a_run(adapter: Path) -> bool:
    real = adapter.resolve()
    return real.name in ("adapter", "adapter_init") and (
        (real.parent / ENVIRONMENT).is_file() or real.parent.parent.name == "clients"
    )
