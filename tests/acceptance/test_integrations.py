"""The adapters with other libraries: quantised bases, TRL, and sharded training with two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from braidlora import FactoredLoraConfig, FactoredLoraLayer, MultiLoraConfig, MultiLoraLayer

pytestmark = pytest.mark.acceptance
METHODS = ["B", "A", "none", "factored"]
IDS = torch.arange(32).view(2, 16) % 60 + 1


def config(method="B", **settings):
    """What `share` says, or a factored LoRA."""
    settings = {
        "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.0, **settings
    }  # fmt: skip
    if method == "factored":
        return FactoredLoraConfig(r_intermediate=6, **settings)
    return MultiLoraConfig(share=method, **settings)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return str(folder)


def quantised(base_folder, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    model = AutoModelForCausalLM.from_pretrained(
        base_folder, quantization_config=quantization, device_map="cpu"
    )
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    assert isinstance(model.model.layers[0].self_attn.q_proj, kind)
    return model


@pytest.mark.parametrize("bits", [8, 4], ids=["8-bit", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_base_on_the_cpu(method, bits, base_folder, tmp_path):
    # A model for each question: bitsandbytes repacks a 4-bit weight at the first evaluation on a CPU, and passes no
    # gradient from then on, whatever the adapter.
    with torch.no_grad():
        before = quantised(base_folder, bits)(input_ids=IDS).logits
        unchanged = get_peft_model(quantised(base_folder, bits), config(method)).eval()(input_ids=IDS).logits
    assert torch.equal(unchanged, before)

    model = get_peft_model(prepare_model_for_kbit_training(quantised(base_folder, bits)), config(method))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        loaded = (
            PeftModel.from_pretrained(quantised(base_folder, bits), tmp_path).eval()(input_ids=IDS).logits
        )
    torch.testing.assert_close(loaded.float(), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4], ids=["8-bit", "nf4"])
@pytest.mark.parametrize("mergeable", [config(num_experts=1), config("factored")], ids=["lora", "factored"])
def test_merging_into_a_quantised_base_is_refused(mergeable, bits, base_folder):
    from braidlora.errors import MergeError

    model = get_peft_model(quantised(base_folder, bits), mergeable)
    with pytest.raises(MergeError, match="unquantized"):
        model.merge_and_unload()


@pytest.mark.parametrize(("method", "peft_type"), [("B", "BRAIDLORA"), ("factored", "FACTOREDLORA")])
def test_trl_sft_trainer(method, peft_type, base_folder, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    rows = Dataset.from_dict({"text": ["a b c d e f", "c d e f g h", "b c d e f g"] * 8})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=2e-2, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, max_length=16, gradient_checkpointing=True, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_folder), args=arguments, train_dataset=rows,
        processing_class=tokenizer, peft_config=config(method),
    )  # fmt: skip
    layer = FactoredLoraLayer if method == "factored" else MultiLoraLayer
    assert any(isinstance(module, layer) for module in trainer.model.modules())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == peft_type


@pytest.mark.parametrize("how", ["fsdp1", "fsdp1-orig-params", "fsdp2", "fsdp2-leaves", "ddp"])
@pytest.mark.parametrize(("method", "factors"), [("alora", 3), ("factored", 5)])
def test_two_processes_train_like_one(method, factors, how, base_folder, tmp_path):
    """Two gloo ranks with half the batch each give the weights that one process with the whole batch gives."""
    single, double = tmp_path / "single.pt", tmp_path / "double.pt"
    run_ranks(1, method, "single", base_folder, single)
    run_ranks(2, method, how, base_folder, double)
    expected, actual = torch.load(single, weights_only=True), torch.load(double, weights_only=True)
    assert actual.keys() == expected.keys()
    assert len(expected) == 2 * 2 * factors
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, atol=2e-5, rtol=1e-4)


def run_ranks(world_size, method, how, base_folder, out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("sharded_worker.py")
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world_size),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), method, how, base_folder, str(out)],
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-3000:]
