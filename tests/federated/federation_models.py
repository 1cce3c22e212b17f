"""A tiny random base, tiny rows for three clients, and federated recipes over them."""

import json
import random

import torch

from braidlora.config import FederatedConfig

WORDS = [
    "<unk>",
    "</s>",
    "<s>",
    "<pad>",
    "up",
    "rev",
    "len",
    ":",
    "->",
    *"abcdefABCDEF",
    *"0123456789",
    "yes",
    "no",
]
NAMES = ("len", "rev", "up")


def build_base(folder):
    """A random Llama of one layer with a tokenizer of characters and a few words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"up|rev|len|yes|no|->|\S"), "removed", invert=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=2, eos_token_id=1, pad_token_id=3,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(folder):
    """Three tasks of different size; as classification, whether a word holds an a."""
    draw = random.Random(0)
    answers = {"up": str.upper, "rev": lambda word: word[::-1], "len": lambda word: str(len(word))}
    for task, count in (("up", 24), ("rev", 16), ("len", 10)):
        words = ["".join(draw.choices("abcdef", k=draw.randint(2, 5))) for _ in range(count)]
        rows = [{"instruction": task, "input": word, "output": answers[task](word)} for word in words]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        labels = [
            {"text": f"{task} {' '.join(word)}", "label": "yes" if "a" in word else "no", "site": word[0]}
            for word in words
        ]
        (folder / f"{task}-labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return folder


def recipe(base, rows, output, *, kind="generate", **overrides):
    """A recipe as plain data; keyword arguments are dotted keys with `__` for the dot, `federation__` left out."""
    suffix = "" if kind == "generate" else "-labels"
    data = {
        "model": {"path": str(base)},
        "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        "tasks": [
            {"name": name, "kind": kind, "train": str(rows / f"{name}{suffix}.jsonl")}
            | ({"max_new_tokens": 3} if kind == "generate" else {})
            for name in NAMES
        ],
        "split": {"test": 0.2},
        "prompt": {"cutoff": 24} | ({"template": "{instruction}:{input}->"} if kind == "generate" else {}),
        "training": {"batch_size": 8, "learning_rate": 0.05},
        "federation": {"rounds": 2, "evaluate_every": 0},
        "seed": 1,
        "output": str(output),
    }
    for dotted, value in overrides.items():
        path = dotted.split("__")
        if path[0] not in data:
            path.insert(0, "federation")
        node = data
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return data


def federated_config(*args, **options):
    return FederatedConfig.model_validate(recipe(*args, **options))
