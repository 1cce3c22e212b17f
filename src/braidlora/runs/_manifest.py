"""Manifests: sha256 and size of every file of a folder, and reads that check the bytes they return."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from braidlora.errors import CheckpointError, TrainingError
from braidlora.json_text import loads
from braidlora.runs._files import parse_json

MANIFEST = "manifest.json"
Entry = dict[str, Any]  # {"bytes": size, "sha256": hex digits}
_BLOCK = 1 << 20


class IncompleteError(CheckpointError):
    """A folder is incomplete, or a file is truncated, as after a crash or on a full disk."""


class Committed:
    """A folder with a manifest, whose files are checked when they are read.

    A file is opened once, and the bytes that were checked are returned, so it cannot change between check and use. The
    manifest is read when the object is created.

    Args:
        directory: a folder written by `commit_directory`.
        needs_manifest: False also accepts a folder without a manifest, such as an adapter saved by PEFT, and reads its
            files unchecked.

    Attributes:
        files: the entries of the manifest, by relative path; None if there is no manifest.

    Raises:
        IncompleteError: the manifest is missing or truncated.
        CheckpointError: the folder does not exist, or the manifest has changed.
    """

    def __init__(self, directory: Path, *, needs_manifest: bool = True) -> None:
        self.directory = directory
        self.files: dict[str, Entry] | None = None
        if needs_manifest or (directory / MANIFEST).is_file() or not directory.is_dir():
            self.files = read_manifest(directory)

    def lists(self, name: str) -> bool:
        """Whether the manifest lists the file, or without a manifest, whether the file exists."""
        return name in self.files if self.files is not None else (self.directory / name).is_file()

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            IncompleteError: it is missing, has a different size, or is not in the manifest.
            CheckpointError: it has changed since it was written.
        """
        path = self.directory / name
        if self.files is None:
            return _read(path)
        if name not in self.files:
            raise IncompleteError(f"{path}: not listed in {MANIFEST}, so the file is incomplete.")
        data = _read(path)
        _compare(path, self.files[name], len(data), hashlib.sha256(data).hexdigest())
        return data

    def read_json(self, name: str) -> Any:
        """The content of a JSON file; raises as `read`, or CheckpointError if it is not JSON."""
        return parse_json(self.directory / name, self.read(name))

    @contextmanager
    def copy(self, names: Collection[str]) -> Iterator[Path]:
        """A private temporary folder with checked copies of the listed files in `names`.

        For libraries that need a path: they read exactly the bytes that were checked.

        Raises:
            TrainingError: the folder for temporary files is not writable.
            IncompleteError, CheckpointError: as `read`.
        """
        with ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="braidlora-")))
                for name in names:
                    if self.lists(name):
                        target = folder / name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        self._copy(name, target)
            except OSError as error:
                raise TrainingError(
                    f"{gettempdir()}: a file of {self.directory} cannot be copied there: {error.strerror or error}. "
                    "Free space on that disk, or set TMPDIR to a folder on another disk."
                ) from error
            yield folder

    def _copy(self, name: str, target: Path) -> None:
        """Copy a file block by block and check the copied bytes."""
        path, digest = self.directory / name, hashlib.sha256()
        with _opened(path) as source, open(target, "wb") as copy:
            while block := source.read(_BLOCK):
                digest.update(block)
                copy.write(block)
        if self.files is not None:
            _compare(path, self.files[name], target.stat().st_size, digest.hexdigest())

    def verify(self, optional: Collection[str] = ()) -> dict[str, Entry]:
        """Check every file, of which `optional` ones may be missing, and return the entries of those that exist.

        Raises:
            IncompleteError: a file is missing or has a different size.
            CheckpointError: a file has changed.
        """
        assert self.files is not None
        present = {
            name: entry
            for name, entry in self.files.items()
            if name not in optional or (self.directory / name).exists()
        }
        for name, entry in present.items():
            check_file(self.directory / name, entry)
        return present


def read_manifest(directory: Path) -> dict[str, Entry]:
    """The entries of a folder's manifest.

    Raises:
        IncompleteError: the manifest is missing or truncated.
        CheckpointError: the folder does not exist, or the manifest has changed.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder.")
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        raise IncompleteError(f"{directory}: {MANIFEST} is missing, so the folder is incomplete.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    if not text.endswith("}\n"):
        raise IncompleteError(f"{path}: truncated, so the folder is incomplete.")
    try:
        files: dict[str, Entry] = loads(text)["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: changed since it was written ({error}).") from None
    if text != manifest_text(files):
        raise CheckpointError(f"{path}: changed since it was written (its own sha256 does not match).")
    return files


def check_file(path: Path, entry: Entry) -> None:
    """Check a file against its entry; raises as `Committed.read`."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = entry["sha256"] if size != entry["bytes"] else _digest(file)
    _compare(path, entry, size, digest)


def entry_of(data: bytes) -> Entry:
    """The entry of a file with this content."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def entry_of_file(path: Path, *, sync: bool = False) -> Entry:
    """The entry of a file on disk; with `sync` the file is synced first."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = _digest(file)
        return {"bytes": file.tell(), "sha256": digest}


def manifest_text(files: dict[str, Entry]) -> str:
    """The text of a manifest; it includes its own sha256, so that damage to the manifest is detected."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=1) + "\n"


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        return bytes(file.read())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise IncompleteError(f"{path}: missing, although the manifest lists it.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    with file:
        yield file


def _compare(path: Path, entry: Entry, size: int, digest: str) -> None:
    if size != entry["bytes"]:
        raise IncompleteError(
            f"{path}: has {size} bytes, but {entry['bytes']} were written; it is truncated."
        )
    if digest != entry["sha256"]:
        raise CheckpointError(
            f"{path}: sha256 {digest[:12]}… does not match the manifest's {entry['sha256'][:12]}…; the file "
            "has changed since it was written."
        )


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
