"""The linear layers that an adapter would take, from a model's config.json alone."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from braidlora.errors import ConfigError
from braidlora.federated.factors import AdaptedLayer


def packaged_architectures() -> dict[str, Path]:
    """Folders with the dimensions of known models, by name; they hold a config.json and no weights."""
    folder = Path(str(files("braidlora"))) / "assets" / "architectures"
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "config.json").is_file()}


def skeleton(model: str | Path) -> nn.Module:
    """The model without weights (on the meta device), from its config.json.

    Args:
        model: a folder with a config.json, a name in `packaged_architectures`, or a name on the hub.

    Raises:
        ConfigError: there is no such configuration, or transformers cannot build a model from it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    source = packaged_architectures().get(str(model), model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        known = ", ".join(packaged_architectures())
        raise ConfigError(
            f"model {str(model)!r}: no usable config.json ({error}). Give a folder that holds one, or one of {known}"
        ) from error
    # As the configuration says, since tensor names depend on it: a causal LM, a classifier, or the bare network.
    wanted = (getattr(config, "architectures", None) or ["CausalLM"])[0]
    if wanted.endswith("ForSequenceClassification"):
        auto = AutoModelForSequenceClassification
    elif wanted.endswith(("CausalLM", "LMHeadModel")):
        auto = AutoModelForCausalLM
    else:
        auto = AutoModel
    try:
        with init_empty_weights():
            return auto.from_config(config, trust_remote_code=False)
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
