"""Names of methods that are a setting here: DoRA is LoRA with `use_dora`."""

from __future__ import annotations

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

OTHER_METHOD = "other_method"  # the type of the problem
_SETTINGS = {
    "dora": "DoRA is LoRA with `use_dora`: write method: {peft_type: LORA, use_dora: true, r: 8, lora_alpha: 16}",
    "rslora": "rsLoRA is LoRA with another scaling: write adapter.use_rslora: true and method: lora",
    "qlora": "QLoRA is LoRA on a quantized base: write model.quantization: 4bit and method: lora",
    "lora+": "LoRA+ is LoRA with a higher rate for B: write training.rate_multipliers: {B: 16} and method: lora",
    "loraplus": "LoRA+ is LoRA with a higher rate for B: write training.rate_multipliers: {B: 16} and method: lora",
    "fed-alora": "fed-alora is a rule of `braidlora federate` (federation.rule); the method is alora",
    "activated-lora": "Activated LoRA is a setting of PEFT's LoRA: {peft_type: LORA, alora_invocation_tokens: […]}",
    "moe-lora": "write method: moelora",
    "hydra-lora": "write method: hydralora",
    "hydra": "write method: hydralora",
    "full": "full fine-tuning is not an adapter, and braidlora trains adapters only",
}


def what_it_is(method: str) -> str | None:
    """How to write a method that is known under another name or is a setting of another; None if it is neither."""
    return _SETTINGS.get(method.lower().replace("_", "-"))


def _check(method: str) -> str:
    text = what_it_is(method)
    if text is not None:
        raise PydanticCustomError(OTHER_METHOD, "{text}", {"text": text})
    return method


not_another_name = AfterValidator(_check)
