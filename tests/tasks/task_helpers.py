"""What the tests of the tasks room share."""

from __future__ import annotations

from typing import Any

from braidlora.config import PromptSection, RunConfig
from braidlora.tasks import Encoded, Row, Template, encode_examples

WORDS = (
    "the quick brown fox jumps over a lazy dog and answers every question with yes or no maybe "
    "Instruction Input Response ### Below is an instruction that describes a task\n\n"
)
CHAT = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def encode_example(row: Row, template: Template, tokenizer: Any, prompt: PromptSection) -> Encoded | None:
    """`encode_examples` for one row."""
    return encode_examples([row], template, tokenizer, prompt)[0]


def byte_level_tokenizer() -> Any:
    """A byte-level BPE tokenizer (the GPT-2, Llama-3 and Qwen kind) trained on a few words; no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|turn|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<pad>")


def config_of(train: Any, *, task: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """A recipe of one task named `t`."""
    return RunConfig.model_validate({"tasks": [{"name": "t", "train": train, **(task or {})}], **sections})


def questions(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(start, start + count)]
