"""A fingerprint over all bytes of stored weights, whatever dtype they are loaded in and however they are sharded.

Per tensor: sha256 over its name, stored dtype, shape and bytes. Over all: sha256 over these, in the order of names. The
digests of a large file are kept in the user's cache folder, and reused only while the file's device, inode, size,
modification and change times are unchanged. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from braidlora.errors import ConfigError
from braidlora.json_text import loads
from braidlora.paths import cache_folder
from braidlora.runs import BASE_CONFIG, atomic_write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX = "sha256:"
_SMALL = 32 << 20  # bytes; hashing a smaller file is as fast as reading the cache
_FRESH = 2_000_000_000  # ns; a file that changed this recently may change again within the clock's resolution
_LARGEST_HEADER = 100 << 20
_BLOCK = 4 << 20
_THREADS = 4
_VERSION = 1
_HEX = re.compile(r"[0-9a-f]{64}")


def stored_fingerprint(folder: Path) -> str | None:
    """`sha256:` and 64 hex digits over every tensor in `folder`; None if it holds no safetensors.

    Args:
        folder: with `model.safetensors`, or an index and its shards, as transformers looks for them.

    Raises:
        ConfigError: the index or a file is damaged.
    """
    digests: dict[str, str] = {}
    for path, names in _files(folder).items():
        found = tensor_digests(path)
        for name in found if names is None else names:
            if name not in found:
                raise ConfigError(f"{path}: has no tensor {name}, which {INDEX} says it has.")
            digests[name] = found[name]
    if not digests:
        return None
    return PREFIX + _total(digests)


def _total(digests: Mapping[str, str]) -> str:
    lines = (json.dumps([name, digests[name]]) + "\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tensor_digests(path: Path) -> dict[str, str]:
    """The digest of every tensor of a safetensors file, from the cache if the file is unchanged."""
    path = Path(os.path.realpath(path))
    before = _stat(path)
    cached = _read_cache(path, before) if before["size"] >= _SMALL else None
    if cached is not None:
        return cached
    header, start = _header(path)

    def digest(item: tuple[str, Any]) -> str:
        name, about = item
        begin, end = about["data_offsets"]
        return _hash_tensor(path, name, about["dtype"], about["shape"], start + begin, end - begin)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = dict(zip(header, pool.map(digest, header.items()), strict=True))
    if _stat(path) != before:
        raise ConfigError(
            f"{path}: changed while it was read. Try again when no other process is writing to it."
        )
    if before["size"] >= _SMALL:
        _write_cache(path, before, digests)
    return digests


def _hash_tensor(path: Path, name: str, dtype: str, shape: list[int], at: int, size: int) -> str:
    digest = hashlib.sha256(json.dumps([name, dtype, shape]).encode())
    with open(path, "rb") as file:
        file.seek(at)
        while size:
            block = file.read(min(size, _BLOCK))
            if not block:
                raise ConfigError(f"{path}: ends within {name}; the file is truncated.")
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Dtype, shape and offsets of every tensor, and where the data begin."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = loads(file.read(length).decode("utf-8"))
        header.pop("__metadata__", None)
        for about in header.values():
            begin, end = about["data_offsets"]
            if not (isinstance(about["dtype"], str) and all(isinstance(n, int) for n in about["shape"])):
                raise ValueError("a tensor without dtype or shape")
            if not 0 <= begin <= end:
                raise ValueError("a tensor with invalid offsets")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as safetensors ({error}); the file is damaged.") from None
    return header, 8 + length


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files that transformers reads, with the tensors that it uses from each; None means all of them."""
    named = _named_by_config(folder)
    single, index = folder / (named or SINGLE), folder / (named or INDEX)
    if single.is_file() and not single.name.endswith(".index.json"):
        return {single: None}
    if not index.is_file():
        return {}
    files: dict[Path, list[str] | None] = {}
    try:
        places = loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in sorted(places.items()):
            if Path(file).name != file:
                raise ValueError(f"{file!r} is not a file name")
            names = files.setdefault(folder / file, [])
            assert names is not None
            names.append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not readable as an index of shards ({error}).") from None
    return files


def _named_by_config(folder: Path) -> str | None:
    """The weight file that config.json names instead of the usual one; transformers looks for it in the folder."""
    try:
        named = loads((folder / BASE_CONFIG).read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # nothing can be loaded without a configuration
    return named if isinstance(named, str) and Path(named).name == named else None


# ---- the cache


def _stat(path: Path) -> dict[str, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: is not a regular file.")
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _cache_file(path: Path) -> Path:
    return cache_folder("fingerprints") / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _read_cache(path: Path, now: Mapping[str, int]) -> dict[str, str] | None:
    """The cached digests of this file; None if there are none, or they are damaged."""
    try:
        kept = loads(_cache_file(path).read_text(encoding="utf-8"))
        digests = kept["tensors"]
        intact = (
            kept["version"] == _VERSION
            and kept["path"] == str(path)
            and kept["stat"] == now
            and kept["total"] == _total(digests)
            and all(_HEX.fullmatch(digest) for digest in digests.values())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return digests if intact else None


def _write_cache(path: Path, now: Mapping[str, int], digests: Mapping[str, str]) -> None:
    if time.time_ns() - max(now["mtime_ns"], now["ctime_ns"]) < _FRESH:
        return
    kept = {"version": _VERSION, "path": str(path), "stat": now, "tensors": digests, "total": _total(digests)}
    file = _cache_file(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(file, kept)
    except OSError:
        # Without a writable home folder the next start hashes again.
        return
