"""A classifier on an encoder and a language model on the embedded base, each barely trained, and their exports."""

import json
import random
import warnings

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from braidlora.config import RunConfig
from braidlora.export.run import export
from braidlora.one_run import train

LABELS = {"topic": ["red", "blue", "green"], "tone": ["sad", "red"]}
TEMPLATE = "the word is {text}"


def _encoder(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz "]
    vocabulary = {token: index for index, token in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _rows(path, labels):
    draw = random.Random(len(labels))
    rows = [
        {"sentence": "".join(draw.choices("abcdefgh", k=draw.randint(2, 12))), "label": draw.choice(labels)}
        for _ in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The run of a classifier with two tasks that have a label in common."""
    folder = tmp_path_factory.mktemp("classifier")
    recipe = {
        "model": {"path": str(_encoder(folder / "base"))},
        "adapter": {"r": 2, "num_experts": 2, "target_modules": ["query", "value"]},
        "tasks": [
            {
                "name": name, "kind": "classify", "train": _rows(folder / f"{name}.jsonl", labels),
                "columns": {"text": "sentence"}, "options": labels,
            }
            for name, labels in LABELS.items()
        ],
        "prompt": {"template": TEMPLATE, "cutoff": 24},
        "split": {"test": 0.3},
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 0},
        "output": str(folder / "run"),
    }  # fmt: skip
    return _trained(recipe)


@pytest.fixture(scope="session")
def writer(tmp_path_factory):
    """The run of a language model on the embedded base: one task that it writes, one with options."""
    folder = tmp_path_factory.mktemp("writer")
    recipe = {
        "model": {"path": "embedded"},
        "adapter": {"r": 2, "num_experts": 2, "target_modules": ["q_proj", "v_proj"]},
        "tasks": [
            {
                "name": name,
                "train": {"source": f"generated:{name}", "limit": 24},
                "test": {"source": f"generated:{name}", "limit": 9},
            }
            for name in ("rising", "mood")
        ],
        "prompt": {"template": "{instruction} =", "cutoff": 48},
        "evaluation": {"max_new_tokens": 8},
        "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0},
        "output": str(folder / "run"),
    }  # fmt: skip
    return _trained(recipe)


def _trained(recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(RunConfig.model_validate(recipe), progress=False).directory


@pytest.fixture(scope="session")
def forms(classifier, writer, tmp_path_factory):
    """Every form of both: `forms["classifier", "merged"]` is a folder."""
    folder = tmp_path_factory.mktemp("forms")
    found = {}
    for name, run in (("classifier", classifier), ("writer", writer)):
        found[name, "adapter"] = run / "adapter"
        found[name, "lora"], found[name, "merged"] = folder / f"{name}-lora", folder / f"{name}-merged"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(run, found[name, "lora"], static_weights="uniform", score=False, progress=False)
            export(
                run, found[name, "merged"], static_weights="uniform", score=False, merge=True, progress=False
            )
    return found
