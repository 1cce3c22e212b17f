"""The manifest of a directory that grows: a run, a federation, a comparison, an evaluation.

A committed folder is written once. The directory of a run grows, and its manifest with it: files that are about to
change are removed from the manifest first and added again once they are written. A kill can therefore leave files that
are not covered, but never intact files that look damaged. A directory without a manifest was written by version 0.1;
its files are read unchecked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError
from braidlora.runs._files import atomic_write_text, parse_json, read_bytes
from braidlora.runs._manifest import (
    MANIFEST,
    Committed,
    Entry,
    IncompleteError,
    check_file,
    entry_of,
    entry_of_file,
    manifest_text,
    read_manifest,
)


def covered(directory: Path) -> dict[str, Entry] | None:
    """The entries of the directory's manifest; None if it has none.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    return read_manifest(directory) if (directory / MANIFEST).is_file() else None


def cover(directory: Path, names: Iterable[str], pending: Mapping[str, bytes] | None = None) -> None:
    """Add files to the directory's manifest, which is created if missing.

    Args:
        names: relative paths of existing files.
        pending: the content of files that are written next. Their entries are written first, so that a file like
            metrics.json, whose presence means that the run is finished, is always covered.
    """
    files = dict(covered(directory) or {})
    files.update({name: entry_of_file(directory / name) for name in names})
    files.update({name: entry_of(data) for name, data in (pending or {}).items()})
    atomic_write_text(directory / MANIFEST, manifest_text(dict(sorted(files.items()))))


def uncover(directory: Path, prefix: str) -> None:
    """Remove files whose relative path starts with `prefix` from the manifest, because they are about to change."""
    files = covered(directory)
    if files is None or not any(name.startswith(prefix) for name in files):
        return
    kept = {name: entry for name, entry in files.items() if not name.startswith(prefix)}
    atomic_write_text(directory / MANIFEST, manifest_text(kept))


def read_covered(directory: Path, name: str) -> bytes:
    """The bytes of a file of the directory, checked against the manifest if it is listed there.

    Raises:
        CheckpointError: the file is missing or has changed.
    """
    path = directory / name
    files = covered(directory)
    data = read_bytes(path)
    if files is not None and name in files and entry_of(data) != files[name]:
        raise CheckpointError(
            f"{path}: changed since it was written (its sha256 does not match {directory / MANIFEST}). Restore "
            "the original file, or create it again."
        )
    return data


def read_covered_json(directory: Path, name: str) -> Any:
    """The content of a JSON file of the directory; raises as `read_covered`, or CheckpointError if it is not JSON."""
    return parse_json(directory / name, read_covered(directory, name))


def refuse_changed(directory: Path, folders: Iterable[Path] = ()) -> list[CheckpointError]:
    """Find missing files: those that the directory's manifest lists, and those of committed `folders` in it.

    Missing files can be created again. Changed files may be intentional and are not overwritten.

    Raises:
        CheckpointError: a file has changed since it was written.
    """
    problems = {str(directory / name): error for name, error in damages(directory).items()}
    for folder in folders:
        if not folder.is_dir():
            problems = {path: error for path, error in problems.items() if Path(path).parent != folder}
            problems[str(folder)] = IncompleteError(f"{folder}: missing.")
            continue
        try:
            Committed(folder).verify()
        except CheckpointError as error:
            problems[str(folder)] = error
    for problem in problems.values():
        if not isinstance(problem, IncompleteError):
            raise CheckpointError(
                f"{problem} Restore the original, or remove it and create it again with --resume auto."
            )
    return list(problems.values())


def damages(directory: Path, names: Iterable[str] | None = None) -> dict[str, CheckpointError]:
    """The listed files (of `names`, if given) that are missing or have changed, each with its error."""
    found: dict[str, CheckpointError] = {}
    for name, entry in (covered(directory) or {}).items():
        if names is None or name in set(names):
            try:
                check_file(directory / name, entry)
            except CheckpointError as error:
                found[name] = error
    return found
