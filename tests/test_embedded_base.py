"""The base model in the package: small, offline, sound, and with a tokenizer that keeps any text."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from braidlora.assets import embedded_base_path
from braidlora.tasks.generated import generate_suite


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_base_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_base_path()).eval()


TOKENIZER = AutoTokenizer.from_pretrained(embedded_base_path())


def test_it_fits_into_a_package():
    assert sum(path.stat().st_size for path in embedded_base_path().iterdir()) <= 8 * 2**20


def test_it_is_a_llama_of_a_million_parameters_in_safetensors(model):
    assert isinstance(model, LlamaForCausalLM)
    assert 0.8e6 <= sum(p.numel() for p in model.parameters()) <= 2e6
    assert not list(embedded_base_path().glob("*.bin"))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_special_tokens_are_told_apart(tokenizer, model):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(ids)) == 4
    assert [model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id] == ids[:3]


@given(text=st.text(max_size=40).filter(lambda text: text == text.lstrip(" ")))
def test_any_text_survives_encoding_and_decoding(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text.replace("▁", " ").lstrip(" ")


def test_words_of_the_generated_tasks_are_single_tokens(tokenizer):
    for task in generate_suite().values():
        for row in task.train[:50]:
            text = row["instruction"] + " = " + row["output"]
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(text.split())


def test_left_padding_changes_no_answer(tokenizer, model):
    prompts = ["sort 9 4 7 1 =", "add 3 4 ="]
    together = tokenizer(prompts, return_tensors="pt", padding=True)
    assert together["attention_mask"][1, 0] == 0
    both = model.generate(**together, max_new_tokens=6, do_sample=False)[:, together["input_ids"].shape[1] :]
    for prompt, row in zip(prompts, both, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**alone, max_new_tokens=6, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(
            answer, skip_special_tokens=True
        )


def test_it_can_do_what_it_was_trained_on(tokenizer, model):
    for prompt, answer in (("sort 61 4 37 12 =", "4 12 37 61"), ("class wolf =", "animal")):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == answer


def test_the_record_of_its_training_is_there():
    record = json.loads((embedded_base_path() / "training.json").read_text())
    assert record["command"].startswith("python scripts/train_embedded_base.py")
    assert {"seed", "steps", "loss", "accuracy", "machine", "date"} <= set(record)
