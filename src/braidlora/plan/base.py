"""The size of the base model, from shapes: its parameters, and the bytes of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braidlora.config import ModelSection, RunConfig
from braidlora.errors import BraidloraError
from braidlora.models.adapter_targets import linear_names
from braidlora.models.base import enable_gradient_checkpointing
from braidlora.models.gguf import find_gguf
from braidlora.models.hub_copies import at_hand
from braidlora.models.location import resolve_path
from braidlora.models.skeleton import HUB_NAMES, packaged_architectures, skeleton
from braidlora.paths import find_data
from braidlora.plan.memory import ATTENTION
from braidlora.tasks import LabelSpace, load_tasks

_BLOCK = 64  # values that share a scale in bitsandbytes' NF4
_SCALE = 4  # bytes of a scale, float32
_HEADS = ("score", "classifier")  # not quantized, like the output layer


@dataclass(frozen=True)
class Base:
    """A base model without weights.

    Attributes:
        network: on the meta device, in the dtype in which it will be loaded.
        shapes_from: the recipe's path, or the packaged architecture that the dimensions come from.
        parameters: their number; tied ones count once.
        unquantized: bytes of the weights in `network`.
        weights: bytes of the weights as the recipe loads them, quantized or not.
        unpacked: bytes of the largest quantized weight when it is used; 0 without quantization.
        notes: assumptions.
    """

    network: Any
    shapes_from: str
    parameters: int
    unquantized: int
    weights: int
    unpacked: int
    notes: tuple[str, ...] = ()

    def to_json(self, config: RunConfig) -> dict[str, Any]:
        return {
            "path": config.model.path,
            "shapes_from": self.shapes_from,
            "parameters": self.parameters,
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "quantization": config.model.quantization,
            "weight_bytes": self.weights,
            "notes": list(self.notes),
        }


def base_of(config: RunConfig) -> Base:
    """The recipe's base from its config.json, or the header of its GGUF file; no weights are read or downloaded.

    Raises:
        ConfigError: there is no such configuration.
    """
    section = config.model
    path, gguf_file = _dimensions(section)
    labels, notes = _labels(config)
    attention = section.attention if section.attention == "eager" else ATTENTION
    network: Any = skeleton(
        path,
        config.kind,
        num_labels=labels,
        attention=attention,
        revision=section.revision,
        gguf_file=gguf_file,
    )
    if section.dtype != "auto":
        network = network.to(getattr(torch, section.dtype))
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(network)
    unquantized = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    names = [name for name in linear_names(network) if name.rpartition(".")[2] not in _HEADS]
    linear = [network.get_submodule(name).weight for name in names]
    quantized = section.quantization != "none"
    return Base(
        network=network,
        shapes_from=section.path if Path(path).is_dir() else HUB_NAMES.get(path, path),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        unquantized=unquantized,
        weights=unquantized + _change_by_quantization(section.quantization, linear),
        unpacked=max(weight.numel() * weight.element_size() for weight in linear) if quantized else 0,
        notes=tuple(notes),
    )


def _dimensions(section: ModelSection) -> tuple[str, str | None]:
    """Where the base's dimensions are, as `skeleton` takes it: a folder or name, and the GGUF file in the folder."""
    if (
        section.path in {*HUB_NAMES, *packaged_architectures()}
        and section.gguf_file is None
        and not find_data(section.path).is_dir()
    ):
        return section.path, None  # in the package; needs neither the base nor a network
    section = at_hand(section)
    file = find_gguf(section)
    return (resolve_path(section.path), None) if file is None else (str(file.parent), file.name)


def _change_by_quantization(quantization: str, linear: Sequence[Tensor]) -> int:
    """By how many bytes bitsandbytes changes the linear layers' weights; embeddings, norms and heads are not quantized.

    4bit is NF4: half a byte per value and a float32 scale for every 64. 8bit is one byte per value and a scale per row.
    """
    if quantization == "none":
        return 0
    change = 0
    for weight in linear:
        rows, values = weight.shape[0], weight.numel()
        packed = values + rows * _SCALE if quantization == "8bit" else values // 2 + values // _BLOCK * _SCALE
        change += packed - values * weight.element_size()
    return change


def _labels(config: RunConfig) -> tuple[int | None, list[str]]:
    """How many labels a classifier has, from the tasks' options or rows."""
    if config.kind != "classify":
        return None, []
    options = [task.options for task in config.tasks]
    if all(options):
        return len({label for listed in options for label in listed or []}), []
    try:
        return len(LabelSpace.of(load_tasks(config)).names), []
    except BraidloraError as error:
        return 2, [f"a head with 2 labels is assumed, because the labels cannot be read: {error}"]
