"""A model without weights, from its config.json alone."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from braidlora.errors import ConfigError
from braidlora.runs import BASE_CONFIG

# Hub names whose dimensions are in the package: plans for them need neither network nor license.
HUB_NAMES = {
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "Qwen/Qwen2-7B": "qwen2-7b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "sentence-transformers/all-MiniLM-L6-v2": "minilm-l6-h384",
}


def packaged_architectures() -> dict[str, Path]:
    """Folders with the config.json of known models, by name."""
    folder = Path(str(files("braidlora"))) / "assets" / "architectures"
    return {path.name: path for path in sorted(folder.iterdir()) if (path / BASE_CONFIG).is_file()}


def skeleton(
    model: str | Path,
    kind: Literal["generate", "classify"] | None = None,
    *,
    num_labels: int | None = None,
    attention: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> nn.Module:
    """The model without weights (on the meta device), from its config.json, or from the header of a GGUF file.

    Args:
        model: a folder with a config.json, a name in `packaged_architectures`, or a hub name; for those in `HUB_NAMES`
            the dimensions come from the package.
        kind: a causal language model or a sequence classifier; by default what the config.json says.
        num_labels: of the classifier.
        attention: transformers' attn_implementation.
        revision: of a model on the hub.
        gguf_file: a GGUF file in the folder `model`, which has no config.json; the dtype is that of dequantized files.

    Raises:
        ConfigError: there is no such configuration, or transformers cannot build a model from it.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    source = packaged_architectures().get(HUB_NAMES.get(str(model), str(model)), model)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if gguf_file is not None:
        options |= {"gguf_file": gguf_file, "dtype": torch.bfloat16}
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        if gguf_file is not None:
            raise ConfigError(f"model.gguf_file: {model}/{gguf_file}: no usable header ({error})") from error
        known = ", ".join(packaged_architectures())
        raise ConfigError(
            f"model {str(model)!r}: no usable config.json ({error}). Give a folder that holds one, or one of {known}"
        ) from error
    # Tensor names depend on the class: a causal LM, a classifier, or the bare network.
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
