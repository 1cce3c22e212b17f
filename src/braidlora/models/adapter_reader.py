"""Adapter folders in PEFT's format, read strictly.

Files are checked against the folder's manifest, pickles are rejected, every tensor must be present, fit, and be finite.
PEFT itself only warns of missing keys, and ignores keys that it does not expect.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from braidlora.adapters.base_edits import base_edit, why_refused
from braidlora.errors import CheckpointError, TrainingError, is_out_of_memory
from braidlora.runs import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    Committed,
    FederatedDirectory,
    covered,
    read_covered,
    read_json,
    run_around,
)

Shape = tuple[int, ...]

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SHOWN = 6  # keys in a message
# What may differ between a saved adapter and the one whose weights it replaces.
_FREE = (
    "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "fused",  # how a forward is computed; not in adapters of 0.1
    "requires",  # a note to the reader of the file
)  # fmt: skip


def open_adapter(folder: Path) -> Committed:
    """The files of an adapter folder; each is checked when it is read.

    An adapter that PEFT alone saved has no manifest and is read unchecked. Inside a run or a federation every adapter
    has one.

    Raises:
        CheckpointError: a file is missing, the weights are pickled, the configuration is damaged or of an unknown type,
            the adapter belongs to an edited base (see `adapters.base_edits`), or it is not the one that its run or
            federation wrote.
    """
    _check_files(folder)
    real, run = folder.resolve(), run_around(folder)
    home = run.path.resolve() if run is not None else None
    if home is None and real.parent.parent.name == "clients":
        federation = FederatedDirectory(real.parent.parent.parent)
        home = federation.path if federation.experiment.is_file() else None
    found = Committed(folder, needs_manifest=home is not None)
    if home is not None:
        name = (real / MANIFEST).relative_to(home).as_posix()
        if name in (covered(home) or {}):  # the adapter that the run ended with
            read_covered(home, name)
    return found


@contextmanager
def checked_copy(files: Committed) -> Iterator[tuple[Path, Iterator[tuple[str, Tensor]]]]:
    """A private copy of PEFT's two files, for libraries that read by path, and the names and tensors in it.

    Tensors are read one by one.

    Raises:
        CheckpointError: a file is missing, damaged or has changed; a tensor is not finite.
        TrainingError: the folder for temporary files cannot be written.
    """
    if not files.lists(ADAPTER_WEIGHTS):
        raise _no_weights(files.directory)
    with files.copy((ADAPTER_CONFIG, ADAPTER_WEIGHTS)) as copy:
        yield copy, _tensors(copy / ADAPTER_WEIGHTS, files.directory / ADAPTER_WEIGHTS)


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Attach the adapter in `folder` to a base model: `PeftModel.from_pretrained`, but strict.

    Raises:
        CheckpointError: the folder is not an adapter, is damaged or pickled, or does not fit the base; the message
            lists missing and unexpected keys, and those of another shape.
    """
    try:
        with checked_copy(open_adapter(folder)) as (copy, tensors), warnings.catch_warnings():
            found = _shapes(tensors)
            warnings.simplefilter("ignore")  # PEFT's warnings of misfits, which are errors below
            model = peft.PeftModel.from_pretrained(
                base,
                str(copy),
                is_trainable=False,
                ignore_mismatched_sizes=True,
                torch_device=str(base.device),
            )
    except (CheckpointError, TrainingError):
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        name = base.config.name_or_path or type(base).__name__
        raise CheckpointError(f"{folder}: PEFT cannot load this adapter into {name}: {error}") from error
    _check_fit(folder, found, model, optional=_embedding_names(model))
    return model


def restore_adapter(model: PeftModel, files: Committed) -> None:
    """Replace the weights of a model's adapter by those that `files` hold, which must be of the same adapter.

    Args:
        model: with one adapter attached.
        files: a checkpoint, or an adapter folder as `open_adapter` returns it.

    Raises:
        CheckpointError: the weights are missing or damaged, or configuration, keys or shapes differ; the message lists
            the differences.
    """
    _compare_config(model, files)
    with checked_copy(files) as (_, tensors):
        state = dict(tensors)
        _check_fit(files.directory, _shapes(state.items()), model)
        peft.set_peft_model_state_dict(model, state)


def known_type(peft_type: Any) -> bool:
    """Whether the installed PEFT, with what this package registers, has adapters of this type."""
    return isinstance(peft_type, str) and peft_type in peft.PEFT_TYPE_TO_CONFIG_MAPPING


def _check_files(folder: Path) -> None:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _no_weights(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder}: {ADAPTER_CONFIG} is missing; the adapter is incomplete.")
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: has no `peft_type`, so it is not an adapter configuration of PEFT."
        )
    if not known_type(config["peft_type"]):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {config['peft_type']!r}, which the installed PEFT does not know. "
            "Is the file damaged, or does the adapter need a newer PEFT?"
        )
    if setting := base_edit(config):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {why_refused(setting)}.")


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for path in folder.glob("adapter_model*") if path.suffix in _PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder}: has its weights as a pickle ({pickles[0]}), which can run code when it is read. Only "
            f"{ADAPTER_WEIGHTS} is read: load it where you trust it and call save_pretrained() again."
        )
    return CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} is missing; the adapter is incomplete.")


def _tensors(path: Path, original: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the safetensors file `path`; messages name `original`."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise CheckpointError(
                        f"{original}: {key} contains NaN or infinity; use an older checkpoint."
                    )
                yield key, tensor
    except SafetensorError as error:
        raise CheckpointError(f"{original}: damaged or truncated ({error}).") from None


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _compare_config(model: PeftModel, files: Committed) -> None:
    saved = files.read_json(ADAPTER_CONFIG)
    current = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    differing = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} here"
        for name in sorted(set(saved) | set(current))
        if name not in _FREE and _sorted(saved.get(name)) != _sorted(current.get(name))
    ]
    if differing:
        raise CheckpointError(
            f"{files.directory}: the adapter has a different configuration.\n  " + "\n  ".join(differing)
        )


def _sorted(value: Any) -> Any:
    """Lists of names in sorted order: PEFT keeps them as sets."""
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return sorted(value) if names else value


def _embedding_names(model: Any) -> set[str]:
    # PEFT may save resized embeddings with the adapter.
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [layer.weight for layer in layers if layer is not None and hasattr(layer, "weight")]
    return {name for name, value in model.named_parameters() if any(value is weight for weight in weights)}


def _check_fit(
    folder: Path, found: Mapping[str, Shape], model: PeftModel, optional: Iterable[str] = ()
) -> None:
    """Raise unless `found` are the tensors of the model's adapter; `optional` ones may be among them."""
    expected = _shapes(peft.get_peft_model_state_dict(model, save_embedding_layers=False).items())
    problems = []
    if missing := [key for key in expected if key not in found]:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected := [key for key in found if key not in expected and key not in optional]:
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    wrong = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if wrong:
        problems.append(f"{len(wrong)} with a different shape: {_some(wrong)}")
    if problems:
        raise CheckpointError(
            f"{folder}: the adapter does not fit this model. Of {len(expected)} tensors "
            + "; ".join(problems)
            + f". Use the base (and the {ADAPTER_CONFIG}) that it was trained with."
        )


def _some(items: Iterable[str]) -> str:
    items = sorted(items)
    return ", ".join(items[:_SHOWN]) + (f", … ({len(items) - _SHOWN} more)" if len(items) > _SHOWN else "")
