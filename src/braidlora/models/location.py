"""Where a base model's files are: a folder, a GGUF file, a hub name, the embedded base, or inside a package."""

from __future__ import annotations

from pathlib import Path

from braidlora.config import ModelSection
from braidlora.errors import ConfigError
from braidlora.models.gguf import dequantized, find_gguf
from braidlora.models.hub_copies import at_hand
from braidlora.models.package import PACKAGE, package_places
from braidlora.models.presence import EMBEDDED, refuse_unknown_model
from braidlora.paths import find_data, places_searched
from braidlora.runs import ADAPTER_CONFIG, BASE_CONFIG, RECIPE, comparison_cells


def base_source(section: ModelSection) -> str:
    """What to pass to transformers for the recipe's `model`: a folder, or a hub name unchanged.

    For a GGUF file this is a folder of the cache, which is filled first if need be.

    Raises:
        ConfigError: as `hub_copies.at_hand`, `resolve_path`, `gguf.find_gguf` and `gguf.dequantized`.
    """
    section = at_hand(section)
    file = find_gguf(section)
    return resolve_path(section.path) if file is None else str(dequantized(file))


def resolve_path(path: str) -> str:
    """What to pass to transformers for a `model.path` that is not a GGUF file: a folder, or a hub name unchanged.

    Raises:
        ConfigError: `package:NAME/sub` names a package that is not installed or a folder that it lacks; a path that
            can only be local does not exist.
    """
    if path == EMBEDDED:
        from braidlora.assets import embedded_base_path

        return str(embedded_base_path())
    if path.startswith(PACKAGE):
        return _inside_package(path)
    local = find_data(path)
    if local.is_dir():
        if not (local / BASE_CONFIG).is_file():
            raise ConfigError(f"model.path: {path}: {_no_model(local)}")
        return str(local)
    if local.is_file():
        raise ConfigError(
            f"model.path: {path}: a file; expected the folder with {BASE_CONFIG} and the weights, or a .gguf file."
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            f"model.path: no such folder {path!r}; {places_searched(path)}. Expected a folder, a hub name "
            "(owner/name), `embedded`, or `package:NAME/folder`."
        )
    refuse_unknown_model(path)
    return path


def local_folder(section: ModelSection) -> Path | None:
    """The folder of the base's files on this machine; None where a hub model has not been downloaded yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    path = Path(base_source(section))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path), revision=section.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None  # not downloaded; or not a name at all, which loading explains


def _no_model(folder: Path) -> str:
    """What a folder without a model is, and what to give instead."""
    names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    if ADAPTER_CONFIG in names:
        return "an adapter, not a base model. Give the base that it was trained on."
    if RECIPE in names or comparison_cells(folder) is not None:
        what = "a run directory" if RECIPE in names else "a comparison"
        return f"{what}, not a base model. `model.path` of its recipe names the base."
    inside = [name for name in names if (folder / name / BASE_CONFIG).is_file()]
    if inside:
        return f"a folder without a model of its own. It contains models: {', '.join(inside[:6])}."
    there = f"It has {', '.join(names[:6])}{', …' if names[6:] else ''}." if names else "It is empty."
    return f"a folder without a model: there is no {BASE_CONFIG} in it. {there}"


def _inside_package(path: str) -> str:
    for place in package_places(path):
        if (place / BASE_CONFIG).is_file():
            return str(place)
    name, _, folder = path.removeprefix(PACKAGE).partition("/")
    raise ConfigError(f"model.path: the package {name!r} has no model in {folder or 'its folder'!r}.")
