"""Replacing an adapter's weights in place by those of another adapter of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn

from braidlora.adapters._adapter_layer import AdapterLayer
from braidlora.adapters._balance import share_scope
from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters._factored_config import FactoredLoraConfig
from braidlora.errors import CheckpointError, ConfigError

# Settings that are not part of the shape: the layers take them over with the weights.
_TAKEN_OVER = (
    "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "dropout_mask", "router_temperature", "balance_loss",
    "task_names", "alignment_loss", "alignment",
)  # fmt: skip
# What must be equal. Ranks, targets, modules to save and the number of tasks are compared by the tensors.
_SHAPE = ("share", "num_experts", "gate", "task_map", "r_intermediate", "bias", "trainable_token_indices")
_SHOWN = 6


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the weights of the loaded adapter `adapter_name` by those of an adapter in a folder or on the Hub.

    Like `peft.utils.hotswap.hotswap_adapter` for LoRA, with strict checks: nothing is reallocated, parameters stay the
    same objects (a compiled model stays compiled, an optimizer keeps them), and the scaling, dropout, temperature and
    task names of the new adapter are taken over. Both adapters must have the same modules, ranks, number of experts,
    sharing and gate.
    Everything is checked before anything is written, so an error leaves the model unchanged.

    Args:
        model: a PeftModel with a braidlora adapter, or `torch.compile` of one.
        model_name_or_path: an adapter saved by `save_pretrained`.
        adapter_name: the adapter on the model whose weights are replaced; it keeps its name.
        torch_device: where to read the file to; by default the CPU.
        kwargs: `subfolder`, `revision`, `token`, … as for `PeftModel.load_adapter`.

    Raises:
        ConfigError: no such adapter on the model, it is merged, or the adapters differ in shape.
        CheckpointError: the file is damaged, or its tensors do not fit the model.
    """
    wrapped: Any = getattr(model, "_orig_mod", model)  # where torch.compile keeps the model
    current = _current_config(wrapped, adapter_name)
    source = str(model_name_or_path)
    new = PeftConfig.from_pretrained(source, **kwargs)
    if type(new) is not type(current):
        raise ConfigError(
            f"{source}: a {type(new).__name__} adapter cannot replace a {type(current).__name__} one; "
            "load_adapter adds it next to the other"
        )
    differing = [
        f"{name} is {getattr(new, name)!r}, and {getattr(current, name)!r} in the model"
        for name in _SHAPE
        if getattr(new, name, None) != getattr(current, name, None)
    ]
    if differing:
        raise ConfigError(
            f"{source}: not of the same shape as adapter {adapter_name!r} ({'; '.join(differing)}); load_adapter adds "
            "it next to the other"
        )
    expected = get_peft_model_state_dict(wrapped, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = _read(source, torch_device, kwargs)
    _check_tensors(source, tensors, expected)
    new.fused = current.fused  # how it is computed is up to this model
    layers = [
        (layer, new.rank_and_alpha(name)[1])
        for name, layer in wrapped.get_base_model().named_modules()
        if isinstance(layer, AdapterLayer) and layer.has_adapter(adapter_name)
    ]
    if any(tensor.is_meta for tensor in expected.values()):
        raise ConfigError(
            f"adapter {adapter_name!r} is offloaded: its weights are in the model only during a call; delete_adapter "
            "it and load_adapter the other one"
        )

    # Nothing below can fail: `expected` are the parameters' own tensors.
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)
    for layer, lora_alpha in layers:
        layer.configure(adapter_name, new, layer.r[adapter_name], lora_alpha)
    for name in _TAKEN_OVER:
        if hasattr(new, name):
            setattr(current, name, getattr(new, name))
    share_scope(wrapped.get_base_model())  # the new adapter may be the first with a balance loss


def _current_config(model: Any, adapter_name: str) -> Any:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"model is a {type(model).__name__}; it must be a PeftModel with the adapter to replace"
        )
    if adapter_name not in model.peft_config:
        raise ConfigError(
            f"no adapter {adapter_name!r} on this model; known are {', '.join(model.peft_config)}"
        )
    config = model.peft_config[adapter_name]
    if not isinstance(config, (MultiLoraConfig, FactoredLoraConfig)):
        raise ConfigError(
            f"adapter {adapter_name!r} is a {type(config).__name__}; peft.utils.hotswap.hotswap_adapter is for LoRA"
        )
    if any(isinstance(m, AdapterLayer) and adapter_name in m.merged_adapters for m in model.modules()):
        raise ConfigError(
            f"adapter {adapter_name!r} is merged into the base weights; call unmerge_adapter before replacing it"
        )
    return config


def _read(source: str, device: str | None, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    try:
        return dict(load_peft_weights(source, device=device or "cpu", **kwargs))
    except Exception as error:
        raise CheckpointError(f"{source}: the adapter's weights cannot be read: {error}") from error


def _check_tensors(source: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "not in this model": [name for name in tensors if name not in expected],
        "with a different shape": [
            f"{name}: {tuple(tensor.shape)}, here {tuple(expected[name].shape)}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
        "not finite": [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()],
    }
    listed = [_listed(what, names) for what, names in problems.items() if names]
    if listed:
        raise CheckpointError(
            f"{source}: does not fit the adapter in the model, which is unchanged.\n  " + "\n  ".join(listed)
        )


def _listed(what: str, names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(sorted(names)[:_SHOWN])}{more}"
