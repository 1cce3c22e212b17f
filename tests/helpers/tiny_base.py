"""A tiny random base model and generated rows for three tasks."""

import json
import random

import torch

TASKS = ("len", "rev", "up")
WORDS = [
    "<unk>", "</s>", "<s>", "<pad>", "up", "rev", "len", ":", "->", *"abcdefABCDEF", *"0123456789", "yes", "no",
]  # fmt: skip


def build_base(folder, *, seed=0, hidden=64, intermediate=None, layers=2, heads=4):
    """Save a random Llama into `folder`, with a tokenizer of characters and a few words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"up|rev|len|yes|no|->|\S"), "removed", invert=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=hidden, intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        max_position_embeddings=64, bos_token_id=2, eos_token_id=1, pad_token_id=3, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(folder, counts=(40, 24, 16), *, lengths=True):
    """Write three tasks over the same words: `TASK.jsonl` to generate, `TASK-labels.jsonl` to classify.

    Args:
        counts: rows of `up`, `rev` and `len`.
        lengths: the labels of `len` are word lengths; otherwise, as in the other tasks, whether the word has an a.
    """
    draw = random.Random(0)
    answers = {"up": str.upper, "rev": lambda word: word[::-1], "len": lambda word: str(len(word))}
    for task, count in zip(("up", "rev", "len"), counts, strict=True):
        words = ["".join(draw.choices("abcdef", k=draw.randint(2, 5))) for _ in range(count)]
        rows = [{"instruction": task, "input": word, "output": answers[task](word)} for word in words]
        _write(folder / f"{task}.jsonl", rows)
        labels = [
            str(len(word)) if lengths and task == "len" else "yes" if "a" in word else "no" for word in words
        ]
        rows = [
            {"text": f"{task} {' '.join(word)}", "label": label, "site": word[0]}
            for word, label in zip(words, labels, strict=True)
        ]
        _write(folder / f"{task}-labels.jsonl", rows)
    return folder


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
