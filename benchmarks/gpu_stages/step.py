"""A training step of a Llama-3-8B-shaped model with random weights: tokens per second and peak memory.

PEFT LoRA compared with ALoRA (three experts), adapters in float32, on q,o and on all linear layers, with gradient
checkpointing; the base in bfloat16, and in 4 bits if bitsandbytes is installed. A rehearsal uses two tiny layers.
"""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from braidlora import MultiLoraConfig
from gpu_stages.stage import Result, begin, free, peak_mib, random_llama, seconds

LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
TINY = LLAMA_3_8B | {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TARGETS = {"q,o": ["q_proj", "o_proj"], "all-linear": "all-linear"}
COMMON = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
METHODS = {"peft_lora": LoraConfig, "alora": MultiLoraConfig}


def quantize(model: nn.Module) -> nn.Module:
    """Convert every linear layer except the head to 4-bit NF4, one at a time to limit memory."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        four = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        device = module.weight.device
        four.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, four.to(device))
    return model


def measure(
    result: Result, base: str, targets: str, method: str, rounds: int, batch: int, length: int
) -> None:
    device = result.device
    free(device)
    model = random_llama(device, torch.bfloat16, **(TINY if result.rehearsed else LLAMA_3_8B))
    if base == "4bit":
        model = quantize(model)
        free(device)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    settings: dict[str, Any] = {**COMMON, "target_modules": TARGETS[targets]}
    model = get_peft_model(model, METHODS[method](**settings)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss)

    seconds(step, device)
    times = [seconds(step, device) for _ in range(rounds)]
    took = statistics.median(times)
    result.add(
        base=base, targets=targets, method=method, batch=batch, length=length, seconds=took,
        tokens_per_second=batch * length / took, peak_mib=peak_mib(device),
        trainable_parameters=sum(parameter.numel() for parameter in trained),
    )  # fmt: skip


def main() -> None:
    result = begin("step")
    rounds, batch, length = (1, 1, 8) if result.rehearsed else (5, 2, 1024)
    bases = ["bfloat16"]
    if importlib.util.find_spec("bitsandbytes") is not None:
        bases.append("4bit")
    else:
        result.add(base="4bit", skipped="bitsandbytes is not installed")
    for base in bases:
        for targets in TARGETS:
            for method in METHODS:
                measure(result, base, targets, method, rounds, batch, length)


if __name__ == "__main__":
    main()
