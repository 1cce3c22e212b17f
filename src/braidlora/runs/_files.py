"""Files that are whole or absent: write beside, fsync, rename; folders with a manifest of sha256 as commit mark."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
_NOT_LISTED = ("README.md",)  # a model card is there to be edited


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) so that a reader, or a crash at any moment, sees the old or the new file."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused, since JSON has no such numbers."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        CheckpointError: the file is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing. A run writes this file; is this the right directory?"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). The file is damaged.") from None


@contextmanager
def commit_directory(target: Path, known: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder that appears at `target` whole, or not at all.

    Yields a staging folder beside `target`. When the block ends without an exception, every file is synced to disk,
    the manifest (sha256 and size of every file but a README) is written last, and the staging folder is renamed to
    `target`; an older `target` is removed only then. On an exception the staging folder is removed and `target` is
    untouched.

    Args:
        target: where the folder will stand.
        known: entries for the manifest, by relative path, of files that are hard links of committed ones; the block
            may fill it. They are on the disk already, and are not read again: what has happened to such a file since
            it was written must show, rather than be written down as right.
    """
    staging = staging_directory(target)
    remove_tree(staging)
    staging.mkdir(parents=True)
    try:
        yield staging
        finish_directory(staging, target, known)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def staging_directory(target: Path) -> Path:
    """Where a folder is prepared before it is renamed to `target`."""
    return target.with_name(f".{target.name}{PARTIAL}")


def finish_directory(staging: Path, target: Path, known: Mapping[str, Any] | None = None) -> None:
    """Sync, write the manifest, and rename `staging` to `target`. `known` as in `commit_directory`."""
    files, known = {}, known or {}
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        name = path.relative_to(staging).as_posix()
        if name in known:
            files[name] = known[name]
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = _digest(file)
        if path.name in _NOT_LISTED:
            continue
        files[name] = {
            "bytes": path.stat().st_size,
            "sha256": digest.hexdigest(),
        }
    for directory in [path for path in staging.rglob("*") if path.is_dir()]:
        _sync_directory(directory)
    atomic_write_text(staging / MANIFEST, _manifest_text(files))
    if target.exists():
        # rename() cannot replace a folder that has content, so the old one steps aside first.
        old = target.with_name(f".{target.name}.old{PARTIAL}")
        remove_tree(old)
        os.replace(target, old)
        os.replace(staging, target)
        remove_tree(old)
    else:
        os.replace(staging, target)
    _sync_directory(target.parent)


class IncompleteError(CheckpointError):
    """A folder was not written to its end, or files were cut short: what a crash or a full disk leaves behind."""


def verify_manifest(directory: Path, optional: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Check that every file of a committed folder is there, of the recorded size and sha256.

    Args:
        directory: a folder that `commit_directory` made.
        optional: names that may be missing; where they are there, they must be intact.

    Returns:
        the manifest without what is missing: relative path to `{"bytes": …, "sha256": …}`.

    Raises:
        IncompleteError: the folder was never committed, or a file is missing or of another size.
        CheckpointError: a file has changed. Both name the file.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder.")
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        raise IncompleteError(
            f"{directory}: {MANIFEST} is missing, so this was never completely written."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    if not text.endswith("}\n"):
        raise IncompleteError(f"{path}: breaks off, so this was never completely written.")
    try:
        files: dict[str, dict[str, Any]] = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: changed since it was written ({error}).") from None
    if text != _manifest_text(files):
        raise CheckpointError(f"{path}: changed since it was written (its own sha256 does not match).")
    present = {
        name: kept for name, kept in files.items() if name not in optional or (directory / name).exists()
    }
    for name, recorded in present.items():
        _verify_file(directory / name, recorded)
    return present


def _verify_file(path: Path, recorded: dict[str, Any]) -> None:
    if not path.is_file():
        raise IncompleteError(f"{path}: missing, though the manifest lists it.")
    size = path.stat().st_size
    if size != recorded["bytes"]:
        raise IncompleteError(f"{path}: {size} bytes, {recorded['bytes']} were written: it was cut short.")
    with open(path, "rb") as file:
        digest = _digest(file).hexdigest()
    if digest != recorded["sha256"]:
        raise CheckpointError(
            f"{path}: sha256 {digest[:12]}… does not match the manifest's {recorded['sha256'][:12]}…: the file changed "
            "since it was written."
        )


def remove_tree(path: Path) -> None:
    """Remove a folder if it is there; a link is never followed."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _manifest_text(files: dict[str, dict[str, Any]]) -> str:
    # The manifest carries its own digest, so that damage to it shows as well.
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1) + "\n"


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is durable by itself
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
