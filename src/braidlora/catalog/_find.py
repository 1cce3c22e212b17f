"""Where a file of the catalog is: in the user's data folder, in the cache, or at its public address."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from braidlora.catalog._facts import DataFile, Part, data_file
from braidlora.errors import DataError, first_line
from braidlora.paths import DATA_VARIABLE, cache_folder, expanded
from braidlora.terminal import say

MIRROR_VARIABLE = "BRAIDLORA_DATA_MIRROR"
"""An address that serves the files of the catalog under their names, and is used instead of the public ones."""

OFFLINE_VARIABLES = ("BRAIDLORA_OFFLINE", "HF_HUB_OFFLINE")
_TIMEOUT = 30.0  # seconds without an answer
_RETRIES = 1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Found:
    """A file, and how it was found."""

    path: Path
    how: Literal["folder", "cache", "download", "build"]


def local_place(file: DataFile) -> Path | None:
    """Where the file would be in the user's data folder; None where `BRAIDLORA_DATA` is not set."""
    folder = os.environ.get(DATA_VARIABLE)
    return expanded(folder) / file.name if folder else None


def cached_place(file: DataFile) -> Path:
    """Where the file is in the cache once it has been downloaded or built."""
    return cache_folder() / file.name


def find_part(key: str, part: Part) -> Path:
    """The file of a part of a dataset, which is downloaded or built if need be.

    Args:
        key: of the dataset, for messages.
        part: one of its parts.

    Raises:
        DataError: it is nowhere on this machine and cannot be obtained; the message says how else.
    """
    return fetch(data_file(part.file), key).path


def find(file: DataFile) -> Found | None:
    """The file on this machine; None if it is neither in the data folder nor, intact, in the cache."""
    local = local_place(file)
    if local is not None and local.is_file():
        return Found(local, "folder")
    cached = cached_place(file)
    if cached.is_file() and mismatch(file, cached) is None:
        return Found(cached, "cache")
    return None


def fetch(file: DataFile, key: str) -> Found:
    """The file, from this machine or from its public address; raises as `find_part`."""
    if (found := find(file)) is not None:
        return found
    if file.build is not None:
        return Found(_built(file, key), "build")
    return Found(_downloaded(file, key), "download")


def mismatch(file: DataFile, path: Path) -> str | None:
    """How the content at `path` differs from what the catalog records, or None."""
    size = path.stat().st_size
    if file.sha256 is not None:
        expected, digest = f"sha256 {file.sha256}", hashlib.sha256()
    elif file.git_blob is not None:
        expected, digest = f"git blob {file.git_blob}", hashlib.sha1(f"blob {size}\0".encode())
    else:
        return None
    with open(path, "rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    kind = expected.rpartition(" ")[0]
    got = f"{kind} {digest.hexdigest()}"
    return None if got == expected else f"got {size:,} bytes with {got}, expected {expected}"


def _downloaded(file: DataFile, key: str) -> Path:
    mirror = os.environ.get(MIRROR_VARIABLE)
    url = f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url
    if url is None:
        raise _absent(file, key, "it is not published anywhere")
    if offline := next((name for name in OFFLINE_VARIABLES if _is_set(name)), None):
        raise _absent(file, key, f"{offline} is set, so nothing is downloaded")
    with _staging(file) as folder:
        say(f"data:{key}: downloading {url}", file=sys.stderr)
        content = _retrieve(file, key, url, folder)
        if (problem := mismatch(file, content)) is not None:
            place = local_place(file) or f"FOLDER/{file.name} and set {DATA_VARIABLE}=FOLDER"
            raise DataError(
                f"data:{key}: {url} does not match the file in the catalog: {problem}. It was discarded. If you "
                f"trust it, save it as {place}."
            )
        return _keep(file, content)


def _retrieve(file: DataFile, key: str, url: str, folder: Path) -> Path:
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    known: dict[str, Any] = {"content": None}
    pool = pooch.create(
        path=folder, base_url="", registry=known, urls={"content": url}, retry_if_failed=_RETRIES
    )
    try:
        return Path(pool.fetch("content", downloader=pooch.HTTPDownloader(timeout=_TIMEOUT)))
    except requests.exceptions.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise _absent(file, key, f"{url} returned {status}") from None
    except (requests.exceptions.RequestException, OSError) as error:
        raise _absent(file, key, f"the download of {url} failed: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: requests wraps its errors several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return text[:200].rstrip(".")


def _absent(file: DataFile, key: str, why: str) -> DataError:
    """That a file cannot be had, where it was looked for, and both ways to get it."""
    local = local_place(file)
    folder = f"no {local}" if local is not None else f"{DATA_VARIABLE} is not set"
    public = file.url is not None or MIRROR_VARIABLE in os.environ
    fetch_it = (
        f"Either run `braidlora data fetch {key}` where there is a network, or set" if public else "Set"
    )
    return DataError(
        f"data:{key}: no {file.name}: {why}. It is not in the data folder ({folder}) or the cache (no "
        f"{cached_place(file)}) either. {fetch_it} {DATA_VARIABLE} to a folder that holds {file.name}."
    )


def _built(file: DataFile, key: str) -> Path:
    from braidlora.catalog._build import BUILDERS

    assert file.build is not None
    try:
        inputs = {name: fetch(data_file(name), key).path for name in file.inputs}
    except DataError as error:
        raise DataError(
            f"{error} Or set it to a folder that holds {file.name}, which is made from that file."
        ) from None
    with _staging(file) as folder:
        say(f"data:{key}: making {file.name} from {', '.join(file.inputs)}", file=sys.stderr)
        content = folder / "content"
        content.write_bytes(BUILDERS[file.build](file.name, inputs))
        if (problem := mismatch(file, content)) is not None:
            raise DataError(
                f"data:{key}: {file.name} was made from {', '.join(map(str, inputs.values()))} and does not match the "
                f"file in the catalog: {problem}. It was discarded. Check that these are the original files."
            )
        return _keep(file, content)


@contextmanager
def _staging(file: DataFile) -> Iterator[Path]:
    """A temporary folder next to the file's place in the cache."""
    place = cached_place(file)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=place.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or place.parent}: cannot be written: {error.strerror or error}. Free space there, or set "
            "XDG_CACHE_HOME to another folder."
        ) from error


def _keep(file: DataFile, content: Path) -> Path:
    """Move a verified file into the cache; a reader sees all of it or nothing."""
    place = cached_place(file)
    os.replace(content, place)
    return place


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")
