"""A small Llama, and adapters of it with no factor at zero."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from braidlora.models.location import resolve_path

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def small_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def random_adapter(config, seed=0):
    """A PEFT model whose adapter's factors are all random."""
    model = get_peft_model(small_model(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


def on_embedded(folder, config):
    """An adapter of the embedded base in `folder`, random and strong enough to change answers."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(resolve_path("embedded")), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def folder_of(folder, config, seed=0):
    random_adapter(config, seed).save_pretrained(folder)
    return folder
