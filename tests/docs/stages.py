"""What lies in the folder in which a page's commands are run, and which bases take the place of those it names."""

import json
import re
import shutil
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from braidlora.assets import embedded_base_path

ENCODER, WRITER = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
RECIPE = """
model: {path: embedded}
adapter: {r: 2, target_modules: [q_proj]}
tasks:
- {name: sum, train: {source: "generated:sum", limit: 24}, test: {source: "generated:sum", limit: 3}}
- {name: mood, train: {source: "generated:mood", limit: 24}, test: {source: "generated:mood", limit: 3}}
prompt: {template: "{instruction} =", cutoff: 48}
training: {max_steps: 2, batch_size: 8, warmup_steps: 0, threads: 1}
evaluation: {max_new_tokens: 4}
output: runs/my
"""
# What makes a recipe on a page take seconds.
FEWER_STEPS = {
    r"training: \{epochs: [\d.]+": "training: {max_steps: 3",
    r"local: \{epochs: \d+\}": "local: {steps: 1}",
}
# Overrides that make a built-in recipe take seconds; everything else about a command is as on the page.
SHORT = {
    "demo": ["--training.threads=1", "--training.max_steps=2", "--tasks.*.train.limit=16", "--tasks.*.test.limit=3"],
    "fed_demo": [
        "--federation.local.epochs=null", "--federation.local.steps=1", "--federation.rounds=4",
        "--federation.evaluate_every=0",
        "--tasks.*.train.limit=16", "--tasks.*.test.limit=3",
    ],
}  # fmt: skip
# For pages whose commands need a base that has learned something, in place of the above.
LONGER = {
    "advising.md": {"demo": ["--training.threads=1", "--tasks.*.train.limit=60", "--tasks.*.test.limit=3"]},
    "ship.md": {
        "demo": [
            "--training.threads=1", "--training.max_steps=24", "--tasks.*.train.limit=100", "--tasks.*.test.limit=6",
        ],
    },
}  # fmt: skip


# What was done before a page begins.
BEFORE = {
    "analysis.md": [
        "braidlora train my.yaml --output=runs/one", "braidlora train my.yaml --seed=1 --output=runs/other",
        "braidlora federate fed_demo",
    ],
    "exporting.md": [
        "braidlora train demo", "braidlora train demo --adapter.method=lora --output=runs/lora",
        "braidlora federate fed_demo",
    ],
    "reliability.md": ["braidlora train my.yaml --output=runs/mine"],
}  # fmt: skip
FILES = {
    "my.yaml": RECIPE,
    "west.jsonl": "".join(f'{{"instruction": "sum {n} 1", "output": "{n + 1}"}}\n' for n in range(8)),
    "west-test.jsonl": '{"instruction": "sum 8 1", "output": "9"}\n',
}


def shortened(recipe: str) -> str:
    for pattern, fewer in FEWER_STEPS.items():
        recipe = re.sub(pattern, fewer, recipe)
    return recipe


def encoder(folder: Path) -> Path:
    """A random BERT that reads letters, in place of an encoder from the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz 0123456789.?!"]
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(letters), max_position_embeddings=512, **sizes)).save_pretrained(
        folder
    )
    return folder


def writer(folder: Path) -> Path:
    """The embedded base with a chat template, in place of an instruction-tuned model from the hub."""
    shutil.copytree(embedded_base_path(), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    return folder
