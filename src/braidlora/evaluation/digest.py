"""Short digests of models and data, so that predictions are never mistaken for another model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from braidlora.adapters import scaled_layers
from braidlora.adapters._peft_compat import BaseTunerLayer
from braidlora.models.identity import architecture

_BLOCK = 1 << 24  # values


def digest_json(value: Any) -> str:
    """Sixteen hex digits of a JSON-able value."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_digests(model: Any) -> dict[str, str]:
    """`base` and `adapter`: sixteen hex digits each, `none` for an adapter that is absent or disabled.

    All bytes of both are hashed as they are in memory, in their present dtype or quantization, and with the base the
    settings of its configuration that change what it computes.
    """
    base = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    adapter: dict[str, Tensor] = {}
    if isinstance(model, PeftModel):
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        prefix = getattr(model.base_model, "prefix", None)
        if prefix:
            base = {name: value for name, value in base.items() if prefix not in name}
        if not any(layer.disable_adapters for layer in layers):
            for name in model.active_adapters:
                state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
                settings = _settings(model.peft_config[name].to_dict())
                if scaled := scaled_layers(
                    model, name
                ):  # else the digest is that of the adapter as it was saved
                    settings["scaling"] = str(sorted(scaled.items()))
                made = digest_json(settings)
                adapter.update({f"{name} {made} {key}": state[key] for key in sorted(state)})
    # The names that the base's tensors have without an adapter attached.
    plain = (
        (name.removeprefix("base_model.model.").replace(".base_layer.", "."), value)
        for name, value in base.items()
    )
    return {
        "base": _digest(plain, digest_json(architecture(model.config.to_dict()))),
        "adapter": _digest(adapter.items()) if adapter else "none",
    }


def _settings(config: dict[str, Any]) -> dict[str, str]:
    # What changes the forward pass without changing a tensor (alpha, rsLoRA, …); the base's origin does not.
    left_out = ("base_model_name_or_path", "revision", "inference_mode")
    # PEFT appends the head's names to modules_to_save each time an adapter is loaded.
    if config.get("modules_to_save"):
        config = {**config, "modules_to_save": set(config["modules_to_save"])}
    return {
        key: str(sorted(value) if isinstance(value, set) else value)
        for key, value in config.items()
        if key not in left_out
    }


def _digest(tensors: Iterable[tuple[str, Tensor]], before: str = "") -> str:
    digest = hashlib.sha256(before.encode())
    for name, value in tensors:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        if value.device.type == "meta":  # offloaded weights stay on disk
            continue
        flat = value.detach().reshape(-1)
        for block in flat.split(_BLOCK):  # never a second copy of an entire embedding
            digest.update(memoryview(block.contiguous().cpu().view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]
