"""The linear layers that an adapter would take, from a model's config.json alone."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from braidlora.adapters._peft_compat import LoraLayer
from braidlora.errors import ConfigError
from braidlora.federated.protocol.factors import AdaptedLayer

# Names on the hub whose dimensions are in the package: plans for them need neither network nor licence.
HUB_NAMES = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "Qwen/Qwen2-7B": "qwen2-7b",
}


def packaged_architectures() -> dict[str, Path]:
    """Folders with the dimensions of known models, by name; they hold a config.json and no weights."""
    folder = Path(str(files("braidlora"))) / "assets" / "architectures"
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()}


def skeleton(
    model: str | Path,
    kind: Literal["generate", "classify"] | None = None,
    *,
    num_labels: int | None = None,
    attention: str | None = None,
) -> nn.Module:
    """The model without weights (on the meta device), from its config.json.

    Args:
        model: a folder with a config.json, a name in `packaged_architectures`, or a name on the hub; for some of these
            (`HUB_NAMES`) the dimensions are in the package, and the hub is not asked.
        kind: a causal language model or a sequence classifier; by default what the config.json says.
        num_labels: of the classifier.
        attention: transformers' attn_implementation.

    Raises:
        ConfigError: there is no such configuration, or transformers cannot build a model from it.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    source = packaged_architectures().get(HUB_NAMES.get(str(model), str(model)), model)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        known = ", ".join(packaged_architectures())
        raise ConfigError(
            f"model {str(model)!r}: no usable config.json ({error}). Give a folder that holds one, or one of {known}"
        ) from error
    # As the configuration says, since tensor names depend on it: a causal LM, a classifier, or the bare network.
    wanted = (getattr(config, "architectures", None) or ["CausalLM"])[0]
    if kind == "classify" or (kind is None and wanted.endswith("ForSequenceClassification")):
        auto = AutoModelForSequenceClassification
    elif kind == "generate" or wanted.endswith(("CausalLM", "LMHeadModel")):
        auto = AutoModelForCausalLM
    else:
        auto = AutoModel
    chosen = {} if attention is None else {"attn_implementation": attention}
    try:
        # Not accelerate's init_empty_weights, which makes two parameters of tied embeddings.
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False, **chosen)
    except ValueError as error:
        raise ConfigError(f"model {str(model)!r}: transformers cannot build {wanted}: {error}") from error


def adapted_layers(
    model: str | Path | nn.Module, target_modules: list[str] | set[str] | str | None = None
) -> list[AdaptedLayer]:
    """Name, d and k of every linear layer that `target_modules` name, in the model's order.

    Names are those of a PEFT state dict (`base_model.model.…`). PEFT itself matches them, so lists of names, regular
    expressions, "all-linear" and, for a known architecture, None mean what they mean there. A module that is given is
    left with an adapter in it.

    Raises:
        ConfigError: the configuration is not usable, or nothing matches.
    """
    network = model if isinstance(model, nn.Module) else skeleton(model)
    config = LoraConfig(r=1, target_modules=target_modules)
    try:
        adapted = get_peft_model(network, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"target_modules {target_modules!r}: {error}") from error
    return [
        AdaptedLayer(name, module.out_features, module.in_features)
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    ]
