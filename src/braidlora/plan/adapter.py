"""The size of an adapter, from shapes: trained parameters, its file, and the memory of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch

from braidlora.adapters._peft_compat import BaseTunerLayer
from braidlora.config import RunConfig
from braidlora.plan.base import Base
from braidlora.plan.memory import Memory, activation_bytes, optimizer_bytes
from braidlora.safetensors_size import serialized_bytes

_METADATA = {"format": "pt"}  # what PEFT writes into the header


def size_of(model: Any) -> dict[str, int]:
    """The size of a PEFT model's adapter, which may be on the meta device.

    Returns:
        `{"layers", "trainable_parameters", "file_bytes"}`: layers and stacks of experts, trained parameters, and bytes
        of adapter_model.safetensors.
    """
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        "layers": sum(isinstance(module, BaseTunerLayer) for module in model.modules()),
        "trainable_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "file_bytes": file_bytes(state),
    }


def file_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Size of the file that PEFT writes for an adapter's state dict."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return serialized_bytes(shapes, {name: tensor.dtype for name, tensor in state.items()}, _METADATA)


def memory_of(model: Any, base: Base, config: RunConfig) -> Memory:
    """Memory of a training step of the recipe with this PEFT model on the base.

    Args:
        model: on the meta device, with its adapter; it has gradients afterwards.
    """
    training, notes = config.training, []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    everything = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    optimizer, assumed = optimizer_bytes(training.optimizer, trained)
    notes += assumed
    activations: int | None
    try:
        activations = base.unpacked + activation_bytes(
            model, config.kind, training.batch_size, config.prompt.cutoff, getattr(torch, training.precision)
        )
    except (NotImplementedError, RuntimeError) as error:
        activations = None
        notes.append(f"activations of this model cannot be derived from shapes: {error}")
    if base.unpacked:
        notes.append(
            "quantized weights are unpacked when they are used; memory for the largest one is included"
        )
    return Memory(
        rows=training.batch_size,
        tokens=config.prompt.cutoff,
        weights=base.weights,
        adapter=everything - base.unquantized,
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        optimizer=optimizer,
        activations=activations,
        notes=tuple(notes),
    )
