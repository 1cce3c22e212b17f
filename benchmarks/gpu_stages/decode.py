"""Cached greedy decoding: base model, PEFT LoRA and ALoRA at SmolLM2-135M's widths, batch sizes 1 and 8."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model

from braidlora import MultiLoraConfig
from gpu_stages.stage import Result, begin, free, paired, random_llama

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SMOLLM2 | {"vocab_size": 256, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2}
COMMON = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def measure(result: Result, batch: int, tokens: int, prompt: int, rounds: int) -> None:
    device = result.device
    free(device)
    base = random_llama(device, torch.bfloat16, **(TINY if result.rehearsed else SMOLLM2)).eval()
    models = {"base": copy.deepcopy(base)}
    models["peft_lora"] = get_peft_model(copy.deepcopy(base), LoraConfig(**COMMON, init_lora_weights=False))
    models["alora"] = get_peft_model(base, MultiLoraConfig(**COMMON, init_weights=False))
    ids = torch.randint(0, base.config.vocab_size, (batch, prompt), device=device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def step(name: str) -> None:
        with torch.inference_mode():
            made = (
                models[name].eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            )
        assert made.shape == (batch, prompt + tokens)

    steps = {name: (lambda name=name: step(name)) for name in models}
    found = paired(steps, device, "peft_lora", rounds)
    found["tokens_per_second"] = {name: batch * tokens / took for name, took in found["seconds"].items()}
    result.add(batch=batch, prompt=prompt, new_tokens=tokens, **found)


def main() -> None:
    result = begin("decode")
    for batch in (1, 8):
        if result.rehearsed:
            measure(result, batch, tokens=3, prompt=4, rounds=1)
        else:
            measure(result, batch, tokens=32, prompt=128, rounds=4)


if __name__ == "__main__":
    main()
