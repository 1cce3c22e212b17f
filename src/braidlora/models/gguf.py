"""GGUF files as base models: dequantized once by transformers, and loaded from a cache afterwards.

The cache, `$XDG_CACHE_HOME/braidlora/gguf` (by default under ~/.cache), has a folder for each file, named by the file's
sha256: an ordinary checkpoint with bf16 safetensors and the tokenizer with its chat template. A folder is renamed into
place once it is complete, so a conversion that is killed leaves nothing that is loaded later.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braidlora.config import ModelSection
from braidlora.errors import BraidloraError, ConfigError, explain_out_of_memory, first_line, is_out_of_memory
from braidlora.models.package import PACKAGE, package_places
from braidlora.models.quiet import quiet
from braidlora.paths import cache_folder, find_data
from braidlora.runs import (
    BASE_CONFIG,
    MANIFEST,
    commit_directory,
    entry_of_file,
    read_json,
    remove_leftovers,
    try_lock,
)
from braidlora.terminal import say

SUFFIX = ".gguf"
_LAYOUT = 1  # of a folder in the cache; part of its name
_WAIT = 0.2  # seconds between two looks at another process's conversion


def find_gguf(section: ModelSection) -> Path | None:
    """The GGUF file that the recipe's `model` names; None if it names a base in another format.

    Args:
        section: `path` is a folder, `package:NAME/folder` or the file itself; `gguf_file` is the file's name in a
            folder.

    Raises:
        ConfigError: there is no such file (the message lists the existing ones), the folder holds GGUF files only
            and `gguf_file` is not set, or `quantization` is set as well.
    """
    place, name = _place(section.path), section.gguf_file
    if name is None and place.suffix != SUFFIX:
        if place.is_dir() and not (place / BASE_CONFIG).is_file() and (found := _names(place)):
            others = f" (there are also {', '.join(found[1:])})" if found[1:] else ""
            raise ConfigError(
                f"model.path: {section.path} has GGUF files and no {BASE_CONFIG}. Name the file: "
                f"model.gguf_file={found[0]}{others}."
            )
        return None
    if name is not None and Path(name).name != name:
        raise ConfigError(
            f"model.gguf_file: got {name!r}; expected a file name, and the folder in model.path."
        )
    if place.suffix == SUFFIX and not place.is_dir():
        if name not in (None, place.name):
            raise ConfigError(
                f"model.gguf_file: {name}, but model.path names the file {place.name}. Give the folder as model.path, "
                "or set model.gguf_file=null."
            )
        file = place
    elif not place.is_dir():
        raise ConfigError(
            f"model.gguf_file: {name} needs a folder on this machine, and {section.path} is not one. Download the file "
            "(`hf download OWNER/NAME FILE --local-dir FOLDER`) and set model.path=FOLDER. For a base that is not "
            "GGUF, set model.gguf_file=null."
        )
    else:
        assert name is not None
        file = place / name
    if not file.is_file():
        there = _names(file.parent)
        raise ConfigError(
            f"model.gguf_file: no file {file.name!r} in {file.parent}; "
            + (
                f"it has {', '.join(there)}."
                if there
                else "it has no GGUF file. Set model.gguf_file=null for a base in another format."
            )
        )
    if section.quantization != "none":
        raise ConfigError(
            f"model.quantization: {section.quantization} cannot be combined with a GGUF file, whose weights are "
            "rounded already and are dequantized for training. Set model.quantization=none, or give the original "
            "base."
        )
    return file


def dequantized(file: Path) -> Path:
    """The folder of the cache with the dequantized model; the first call for a file fills it, which takes a minute.

    Raises:
        ConfigError: the package gguf is missing, or transformers cannot dequantize this file (its architecture or a
            type of its tensors is unknown, or it is damaged), or the cache cannot be written.
        TrainingError: the model does not fit into memory.
    """
    folder = cache_folder("gguf") / f"{_sha256(file)}-{_LAYOUT}"
    if _is_complete(folder):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"model.gguf_file: reading {file.name} needs the package gguf: pip install 'braidlora[gguf]'."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f"{folder.name}.lock")):
            if not _is_complete(folder):
                remove_leftovers(folder.parent)
                say(f"{file.name}: dequantizing, once; kept in {folder}", file=sys.stderr)
                with quiet(), commit_directory(folder) as staging:
                    _convert(file, staging)
    except OSError as error:
        raise ConfigError(
            f"model.gguf_file: {error.filename or folder.parent} cannot be written: {error.strerror or error}. Free "
            "space there, or set XDG_CACHE_HOME to another folder."
        ) from error
    return folder


def _place(path: str) -> Path:
    """Where `model.path` points on this machine; it may not exist there, as of a hub name."""
    if not path.startswith(PACKAGE):
        return find_data(path)
    places = package_places(path)
    return next((place for place in places if place.exists()), places[0])


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob(f"*{SUFFIX}"))


def _is_complete(folder: Path) -> bool:
    """Whether the folder has every file that its manifest lists, in full size."""
    if not (folder / MANIFEST).is_file():
        return False
    files: dict[str, Any] = read_json(folder / MANIFEST)["files"]
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in files.items()
    )


def _sha256(file: Path) -> str:
    found = file.stat()
    return _sha256_of(os.path.realpath(file), found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=8)
def _sha256_of(path: str, size: int, mtime_ns: int, inode: int) -> str:
    return str(entry_of_file(Path(path))["sha256"])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process converts the same file. Without locks in the file system both convert it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while try_lock(descriptor) is False:
            time.sleep(_WAIT)
        yield
    finally:
        os.close(descriptor)


def _convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer in `file` to `folder`, as transformers stores them, in bf16."""
    import torch
    import transformers

    name = {"gguf_file": file.name}
    # transformers, gguf and tokenizers raise many classes for what they do not know.
    with explain_out_of_memory(
        f"model.gguf_file: out of memory while {file.name} was dequantized, which takes about 4 bytes per parameter",
        "Free memory, or choose a smaller base.",
    ):
        try:
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **name
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **name)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, BraidloraError):
                raise
            raise ConfigError(
                f"model.gguf_file: transformers cannot dequantize {file}: {first_line(error)} Give the base in "
                "safetensors instead."
            ) from error
    if missing := sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])}):
        raise ConfigError(
            f"model.gguf_file: {file} has no weights for {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''} "
            f"of {type(loaded).__name__}. Is it one part of several, or an adapter?"
        )
    # A model that was loaded from GGUF cannot be saved, so its weights go into a new one.
    settings = loaded.config.to_dict()
    del settings["quantization_config"]
    settings.pop("_name_or_path", None)
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.to(torch.bfloat16).state_dict(), assign=True)
    model.config.dtype = torch.bfloat16
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which safetensors makes readable by their owner only
        shutil.copymode(folder / BASE_CONFIG, weights)
