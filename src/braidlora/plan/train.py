"""The plan of a training recipe: the parameters of every method, and the memory of a step."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from braidlora.adapters.sharing import PRESETS, by_method
from braidlora.config import RunConfig
from braidlora.errors import ConfigError
from braidlora.models.attach import attach_adapter
from braidlora.plan.adapter import memory_of, size_of
from braidlora.plan.base import base_of


def plan_training(config: RunConfig) -> dict[str, Any]:
    """Parameters, bytes and memory of the recipe, and of the other methods with its settings.

    Returns:
        `{"plan": "train", "base", "method", "methods": {method: {"layers", "trainable_parameters", "file_bytes"}},
        "memory"}`; bytes throughout.

    Raises:
        ConfigError: the base has no configuration, or the adapter does not fit it.
    """
    base = base_of(config)
    own = config.adapter.method
    name = own if isinstance(own, str) else str(own.get("peft_type")).upper()
    model = _attached(base.network, config)
    methods = {name: size_of(model)}
    memory = memory_of(model, base, config)
    if isinstance(own, str):  # the settings of another PEFT method do not apply to these
        network = model.unload()
        for other in by_method():
            if other == own:
                continue
            try:
                model = _attached(network, _with_method(config, other))
            except ConfigError:
                if other in PRESETS:  # which not every base allows
                    continue
                raise
            methods[other] = size_of(model)
            network = model.unload()
    return {
        "plan": "train",
        "base": base.to_json(config),
        "method": name,
        "methods": {key: methods[key] for key in (*by_method(), name) if key in methods},
        "memory": memory.to_json(),
    }


def _attached(network: Any, config: RunConfig) -> Any:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another method may ignore settings; training warns about its own
        return attach_adapter(network, config, seed=0)


def _with_method(config: RunConfig, method: str) -> RunConfig:
    # Sizes do not depend on dropout, which PEFT's LoRA rejects on experts.
    update = {"method": method, "lora_dropout": 0.0}
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=update)})
