"""A tiny random base and tiny generated tasks."""

import json
import random

import torch

WORDS = [
    "<unk>", "</s>", "<s>", "<pad>", "up", "rev", "len", ":", "->", *"abcdefABCDEF", *"0123456789", "yes", "no",
]  # fmt: skip


def build_base(folder, *, seed=0, hidden=64, layers=2):
    """A random two-layer Llama with a tokenizer of characters and a few words, saved into `folder`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"up|rev|len|yes|no|->|\S"), "removed", invert=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=1,
        pad_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(folder):
    """Three tasks of different size over the same words."""
    draw = random.Random(0)
    answers = {"up": str.upper, "rev": lambda word: word[::-1], "len": lambda word: str(len(word))}
    for task, count in (("up", 40), ("rev", 24), ("len", 16)):
        words = ["".join(draw.choices("abcdef", k=draw.randint(2, 5))) for _ in range(count)]
        rows = [{"instruction": task, "input": word, "output": answers[task](word)} for word in words]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        labels = [
            {"text": f"{task} {' '.join(word)}", "label": "yes" if "a" in word else "no"} for word in words
        ]
        if task == "len":
            labels = [{**row, "label": str(len(word))} for row, word in zip(labels, words, strict=True)]
        (folder / f"{task}-labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return folder
