"""Tiny models with an adapter of each of our types, for tests of PEFT's features."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from braidlora import FactoredLoraConfig, FactoredLoraLayer, MultiLoraConfig, MultiLoraLayer

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 33, 7, 21, 60], [8, 8, 2, 40, 11, 3]])
CONFIGS = {"multi": MultiLoraConfig, "factored": FactoredLoraConfig}
PREFIXES = {"multi": "braidlora_", "factored": "factoredlora_"}


def llama(cls: Any = LlamaForCausalLM, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return cls(LlamaConfig(**{**SIZES, **sizes}))


def config(tuner: str, **settings: Any) -> Any:
    """A configuration whose factors are all drawn, so that the adapter acts from the start."""
    defaults = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False, "lora_dropout": 0.0}
    return CONFIGS[tuner](**{**defaults, **settings})


def adapted(tuner: str, base: Any = None, name: str = "default", **settings: Any) -> Any:
    """A double-precision model in eval mode with one adapter."""
    torch.manual_seed(1)
    return get_peft_model(base or llama(), config(tuner, **settings), adapter_name=name).double().eval()


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (MultiLoraLayer, FactoredLoraLayer))]


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
