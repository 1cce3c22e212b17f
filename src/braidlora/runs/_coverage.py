"""The manifest of a directory whose files come one after another: a run, a federation, a comparison, an evaluation.

A committed folder is written once. A run's directory grows, so its manifest grows with it: what is about to change is
taken out first and put in again once it stands, so a kill leaves files that nothing vouches for, and never intact ones
that look damaged. A directory without a manifest was made by version 0.1; its files are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError
from braidlora.runs._files import atomic_write_text, parse_json
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
    """What the manifest of the directory lists; None where it has none.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    return read_manifest(directory) if (directory / MANIFEST).is_file() else None


def cover(directory: Path, names: Iterable[str], pending: Mapping[str, bytes] | None = None) -> None:
    """Put files into the directory's manifest, which is made where there is none.

    Args:
        names: relative paths of files that stand there.
        pending: the content of files that are written next. Their entries come first, so that a file like
            metrics.json, whose presence says that all is done, is never there without being vouched for.
    """
    files = dict(covered(directory) or {})
    files.update({name: entry_of_file(directory / name) for name in names})
    files.update({name: entry_of(data) for name, data in (pending or {}).items()})
    atomic_write_text(directory / MANIFEST, manifest_text(dict(sorted(files.items()))))


def uncover(directory: Path, prefix: str) -> None:
    """Take files whose relative path begins with `prefix` out of the manifest, since they are about to change."""
    files = covered(directory)
    if files is None or not any(name.startswith(prefix) for name in files):
        return
    kept = {name: entry for name, entry in files.items() if not name.startswith(prefix)}
    atomic_write_text(directory / MANIFEST, manifest_text(kept))


def read_covered(directory: Path, name: str) -> bytes:
    """The bytes of a file of the directory, checked against its manifest where the manifest lists it.

    Raises:
        CheckpointError: it is missing or has changed.
    """
    path = directory / name
    files = covered(directory)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing. Is this the right directory?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    if files is not None and name in files and entry_of(data) != files[name]:
        raise CheckpointError(
            f"{path}: changed since it was written (its sha256 does not match {directory / MANIFEST}). Put the file "
            "back as it was, or make it anew."
        )
    return data


def read_covered_json(directory: Path, name: str) -> Any:
    """The content of a JSON file of the directory; raises as `read_covered`, and where it is no JSON."""
    return parse_json(directory / name, read_covered(directory, name))


def refuse_changed(directory: Path, folders: Iterable[Path] = ()) -> list[CheckpointError]:
    """What is missing of the listed files of the directory, and of committed folders in it.

    What is missing can be made again. What has changed is somebody's doing, and is not written over.

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
                f"{problem} Put it back as it was; or remove it, and --resume auto makes it again."
            )
    return list(problems.values())


def damages(directory: Path, names: Iterable[str] | None = None) -> dict[str, CheckpointError]:
    """The listed files that are missing or have changed, each with its error. `names`: only these."""
    found: dict[str, CheckpointError] = {}
    for name, entry in (covered(directory) or {}).items():
        if names is None or name in set(names):
            try:
                check_file(directory / name, entry)
            except CheckpointError as error:
                found[name] = error
    return found
