"""A LoRA merged into its base: a model that needs no PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from braidlora.evaluation.loading import load_adapter

_PROBE = (2, 16)  # sequences and tokens on which the merged model is compared


@torch.no_grad()
def merge_and_save(base: Any, tokenizer: Any, lora: Path, folder: Path) -> dict[str, Any]:
    """Add the LoRA in the folder `lora` to the base's weights, and save the model with its tokenizer into `folder`.

    Returns:
        the weights' `dtype`, to which the sum W0 + ΔW is rounded, and by how much the logits of random tokens differ
        from those of base and LoRA at most.
    """
    adapted = load_adapter(base, lora).eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, _PROBE, generator=generator).to(adapted.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = adapted(**inputs).logits
    merged = adapted.merge_and_unload(safe_merge=True)
    difference = (merged(**inputs).logits - before).abs().max().item()
    merged.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return {
        "dtype": str(merged.dtype).removeprefix("torch."),
        "largest_logit_difference": difference,
        "largest_logit": before.abs().max().item(),
    }
