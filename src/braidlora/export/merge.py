"""A LoRA merged into its base: a model that needs no PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from braidlora.errors import ConfigError
from braidlora.models.adapter_reader import load_adapter
from braidlora.models.quiet import quiet

_PROBE = (2, 16)  # sequences and tokens on which the merged model is compared
# Tolerated error of the merged model's logits, relative to the largest: rounding W0 + ΔW to the weights' dtype is far
# below, an adapter that cannot be written as a sum with W0 far above.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
_TOLERANCE_16_BIT = 0.25
_REMEDY = "Leave out --merge: PEFT loads the adapter together with its base."


@torch.no_grad()
def merge_and_save(base: Any, tokenizer: Any, lora: Path, folder: Path) -> dict[str, Any]:
    """Add the LoRA in the folder `lora` to the base's weights, and save the model with its tokenizer into `folder`.

    Returns:
        the weights' `dtype`, to which W0 + ΔW is rounded, and the largest difference of the logits of random tokens
        from those of base and LoRA.
    """
    adapted = load_adapter(base, lora).eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, _PROBE, generator=generator).to(adapted.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = adapted(**inputs).logits
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"--merge: PEFT cannot merge this adapter: {error} {_REMEDY}") from error
    difference, largest = (merged(**inputs).logits - before).abs().max().item(), before.abs().max().item()
    if not difference <= _TOLERANCE.get(merged.dtype, _TOLERANCE_16_BIT) * largest:
        raise ConfigError(
            f"--merge: on random tokens the merged model's logits differ by {difference:.2g} from those of base and "
            f"adapter (largest logit {largest:.3g}), so it would be a different model. {_REMEDY}"
        )
    with quiet():
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    return {
        "dtype": str(merged.dtype).removeprefix("torch."),
        "largest_logit_difference": difference,
        "largest_logit": largest,
    }
