"""Adapters on disk in PEFT's format: byte for byte reproducible when saved, strict when loaded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.errors import CheckpointError
from braidlora.runs import AdapterCard, Committed

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_SHOWN = 6  # keys that a message lists
# What may differ between a saved adapter and the one it is loaded into.
_FREE = (
    "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "fused",  # how a forward is computed; not in adapters of 0.1
    "requires",  # a note to the reader of the file
)  # fmt: skip


def save_adapter(
    model: PeftModel,
    directory: Path,
    state_dict: dict[str, Tensor] | None = None,
    card: AdapterCard | None = None,
) -> None:
    """Write the adapter's weights and configuration into the folder `directory`, with its README and `braidlora.json`.

    The same adapter gives the same bytes: PEFT writes sets in hash order, and here they are sorted.
    """
    with _own_card(model):
        model.save_pretrained(
            str(directory), safe_serialization=True, save_embedding_layers=False, state_dict=state_dict
        )
    _finish_adapter(directory, model.peft_config["default"], card)


def write_adapter(
    directory: Path, tensors: Mapping[str, Tensor], config: PeftConfig, card: AdapterCard | None = None
) -> None:
    """Write an adapter that stands in no model: its tensors by PEFT's names, and the files beside them."""
    from safetensors.torch import save_file

    contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
    save_file(contiguous, str(directory / WEIGHTS), metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    _finish_adapter(directory, config, card)


def _finish_adapter(directory: Path, config: PeftConfig, card: AdapterCard | None) -> None:
    """Give the configuration an order that is always the same, and write the README and what the adapter means."""
    path = directory / CONFIG
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name in saved:
        if isinstance(getattr(config, name, None), set):
            saved[name] = sorted(saved[name])
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / CARD).write_text(model_card(saved), encoding="utf-8")
    if card is not None:
        card.write(directory)
    # safetensors writes for the owner alone; who may read the configuration may read the weights.
    shutil.copymode(path, directory / WEIGHTS)


@contextmanager
def _own_card(model: PeftModel) -> Iterator[None]:
    """PEFT compiles a template for its card at every save; ours replaces it anyway."""
    model.create_or_update_model_card = lambda directory: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


def model_card(config: dict[str, Any]) -> str:
    """The README of an adapter: what it is and how to load it."""
    base = config.get("base_model_name_or_path") or "the base model"
    ours = config["peft_type"] in ("BRAIDLORA", "FACTOREDLORA")
    kind = (
        "AutoModelForCausalLM"
        if config.get("task_type") == "CAUSAL_LM"
        else "AutoModelForSequenceClassification"
    )
    share = {"B": "ALoRA (shared B)", "A": "HydraLoRA (shared A)", "none": "MoE-LoRA (nothing shared)"}
    what = config["peft_type"]
    if what == "BRAIDLORA":
        what = f"{share[config['share']]}, {config['num_experts']} experts"
    elif what == "FACTOREDLORA":
        what = f"Factored LoRA (heterogeneous Fed-ALoRA), intermediate rank {config['r_intermediate']}"
    rank = f", rank {config['r']}" if "r" in config else ""
    labels = "" if kind == "AutoModelForCausalLM" else ", num_labels=NUMBER_OF_LABELS"
    return (
        "---\n"
        f"base_model: {base}\nlibrary_name: peft\ntags:\n- braidlora\n- lora\n"
        "---\n\n"
        f"# {what}{rank}\n\n"
        "```python\n"
        + ("import braidlora  # first: it registers this adapter's type with PEFT\n" if ours else "")
        + "from peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{base}"{labels})\n'
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")\n'
        "```\n\n"
        + (
            f"Without `import braidlora` PEFT fails with a `KeyError`, since it does not know the type "
            f"`{config['peft_type']}`.\n"
            if ours
            else ""
        )
    )


def load_adapter(model: PeftModel, source: Committed | Path) -> None:
    """Load an adapter into `model`, which must have exactly its modules and shapes.

    Args:
        source: a committed folder; the path of a folder that may have been saved by PEFT alone, without a manifest.

    Raises:
        CheckpointError: the weights are missing, pickled or damaged, or configuration, keys or shapes differ; the
            message lists what differs.
    """
    import peft

    folder = source if isinstance(source, Committed) else Committed(source, needs_manifest=False)
    directory = folder.directory
    _compare_config(model, folder)
    state = _read_weights(folder)
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = _listed("missing", sorted(set(expected) - set(state)))
    problems += _listed("not in this model", sorted(set(state) - set(expected)))
    problems += _listed(
        "of another shape",
        [
            f"{name}: {tuple(state[name].shape)}, here {tuple(expected[name].shape)}"
            for name in sorted(set(state) & set(expected))
            if state[name].shape != expected[name].shape
        ],
    )
    if problems:
        raise CheckpointError(f"{directory / WEIGHTS}: does not fit this model.\n  " + "\n  ".join(problems))
    peft.set_peft_model_state_dict(model, state)


def _compare_config(model: PeftModel, folder: Committed) -> None:
    saved = folder.read_json(CONFIG)
    config = model.peft_config["default"]
    current = json.loads(json.dumps(config.to_dict(), default=sorted))
    differing = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {current.get(name)!r} here"
        for name in sorted(set(saved) | set(current))
        if name not in _FREE and _plain(saved.get(name)) != _plain(current.get(name))
    ]
    if differing:
        raise CheckpointError(
            f"{folder.directory}: the adapter has another configuration.\n  " + "\n  ".join(differing)
        )


def _plain(value: Any) -> Any:
    """Lists of names without their order, since PEFT keeps them as sets."""
    return (
        sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
    )


def _read_weights(folder: Committed) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    directory = folder.directory
    if not folder.lists(WEIGHTS) and (directory / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{directory / 'adapter_model.bin'}: a pickled adapter is refused, since reading it can run code; "
            f"expected {WEIGHTS}. Convert it where you trust it."
        )
    data = folder.read(WEIGHTS)
    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory / WEIGHTS}: not readable as safetensors: {error}.") from None


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"]
