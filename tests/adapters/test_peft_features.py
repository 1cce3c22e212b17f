"""What users of PEFT and transformers do with an adapter, one test each, on tiny random models."""

import copy
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model
from tiny import IDS, SIZES, llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from braidlora import MultiLoraConfig, MultiLoraLayer
from braidlora.errors import MergeError

SHARES = ["B", "A", "none"]


def config(**settings):
    """A configuration whose B is drawn too, so that the adapter acts from the start."""
    defaults = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "init_weights": False,
    }
    return MultiLoraConfig(**{**defaults, **settings})


def logits(model, ids=IDS):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, MultiLoraLayer)]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("share", SHARES)
def test_zero_init_identity(share):
    base = llama()
    before = logits(base)
    model = get_peft_model(base, config(share=share, init_weights=True))
    assert torch.equal(logits(model), before)
    assert len(layers(model)) == 4
    assert all("braidlora_" in name for name in trainable(model))


@pytest.mark.parametrize("share", SHARES)
def test_save_and_from_pretrained_are_equal_to_the_bit(share, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(share=share))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin"))

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    lazy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lazy = PeftModel.from_pretrained(lazy, tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(lazy), expected)


def test_state_dict_can_be_filled_from_outside():
    model = get_peft_model(llama(), config())
    other = get_peft_model(llama(), config())
    keys = [key for key in model.state_dict() if "braidlora_" in key]
    assert "base_model.model.model.layers.0.self_attn.q_proj.braidlora_A.default.weight" in keys
    assert len(keys) == 4 * 3
    other.load_state_dict({key: model.state_dict()[key] for key in keys}, strict=False)
    assert torch.equal(logits(model), logits(other))


def test_transformers_load_and_delete_adapter(tmp_path):
    base = llama()
    before = logits(base)
    model = get_peft_model(base, config())
    expected = logits(model)
    model.save_pretrained(tmp_path)

    native = llama()
    native.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(native), expected)
    native.disable_adapters()
    assert torch.equal(logits(native), before)
    native.enable_adapters()
    native.delete_adapter("mine")
    assert torch.equal(logits(native), before)


def test_transformers_add_adapter():
    model = llama()
    before = logits(model)
    model.add_adapter(config(), adapter_name="mine")
    assert model.active_adapters() == ["mine"]
    assert not torch.equal(logits(model), before)
    assert trainable(model) == {name for name, _ in model.named_parameters() if "braidlora_" in name}


def test_second_adapter_with_its_own_rank_experts_and_targets(tmp_path):
    model = get_peft_model(llama(), config())
    first = logits(model)
    trained = trainable(model)
    model.add_adapter(
        "second", config(share="none", r=2, num_experts=2, target_modules=["v_proj", "up_proj"])
    )
    assert trainable(model) == trained, "an added adapter is frozen until it is chosen"
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".second." in name}
    assert not torch.equal(second, first)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, adapter_name="default")
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)
    loaded.delete_adapter("second")
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), first)
    assert all("second" not in layer.gate and "second" not in layer.braidlora_A for layer in layers(loaded))


def test_disable_adapter():
    base = llama()
    before = logits(base)
    model = get_peft_model(base, config())
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted)


def test_modules_to_save(tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config(task_type=TaskType.SEQ_CLS, modules_to_save=["score"]))
    assert any("score.modules_to_save.default" in name for name in trainable(model))
    before = logits(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    expected = logits(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(untouched, tmp_path)), expected)


def test_all_linear_targets_for_both_adapters():
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    assert len(layers(model)) == 2 * 7
    assert not isinstance(model.base_model.model.lm_head, MultiLoraLayer)
    model.add_adapter("second", config(target_modules="all-linear", r=2))
    assert all(set(layer.r) == {"default", "second"} for layer in layers(model))


@pytest.mark.parametrize("share", SHARES)
def test_conv1d_of_gpt2(share, tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    untouched, before = copy.deepcopy(base), logits(base)
    model = get_peft_model(base, config(share=share, target_modules=None))
    assert [layer.out_features for layer in layers(model)] == [96, 96]
    expected = logits(model)
    assert not torch.equal(expected, before)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(untouched, tmp_path)), expected)


def test_bf16_base_with_float32_adapter():
    model = get_peft_model(llama().to(torch.bfloat16), config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert logits(model).dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    same_dtype = get_peft_model(llama().to(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in same_dtype.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_left_padding(beams):
    model = get_peft_model(llama(), config()).eval()
    prompt = torch.tensor([[4, 50, 17]])
    alone = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, num_beams=beams
    )
    padded = torch.tensor([[0, 0, 4, 50, 17], [9, 3, 44, 2, 61]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=5, num_beams=beams)
    assert batch[0, 5:].tolist()[: alone.shape[1] - 3] == alone[0, 3:].tolist()


def test_torch_compile_of_the_model():
    model = get_peft_model(llama(), config(lora_dropout=0.0)).train()

    def loss_and_gradients(module):
        model.zero_grad()
        loss = module(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    torch._dynamo.reset()
    loss, gradients = loss_and_gradients(torch.compile(model, backend="aot_eager"))
    eager_loss, eager = loss_and_gradients(model)
    torch.testing.assert_close(loss, eager_loss)
    for name, gradient in eager.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on the CPU needs a C++ compiler")
def test_torch_compile_with_inductor():
    model = get_peft_model(llama(), config(lora_dropout=0.0))
    layer = layers(model)[0]
    x = torch.randn(4, 5, 32, requires_grad=True)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 64, (2, 8), generator=generator).repeat(12, 1)  # learnable

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(folder, *, resume=None, checkpointing=True, base=None, **settings):
    model = get_peft_model(base or llama(), config(init_weights=True, **settings))
    torch.manual_seed(1)
    with torch.no_grad():  # get_peft_model draws; both runs must start alike
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=4, learning_rate=3e-2,
        gradient_checkpointing=checkpointing, report_to=[], seed=3, use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("share", ["B", "none"])
def test_trainer_with_gradient_checkpointing_and_resume(share, tmp_path):
    losses, weights = train(tmp_path / "whole", share=share)
    assert losses[-1] < losses[0]
    resumed, same = train(tmp_path / "resumed", share=share, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed[-3:] == losses[-3:]
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    """The balance loss included: it is attached inside the layer, not carried by hooks or keyword arguments."""
    settings = {"lora_dropout": 0.0, "balance_loss": 0.1}
    _, without = train(tmp_path / "without", checkpointing=False, **settings)
    _, weights = train(tmp_path / "with", checkpointing=True, **settings)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, without[name], atol=1e-6, rtol=1e-5)
    _, unbalanced = train(tmp_path / "unbalanced", lora_dropout=0.0)
    router = next(name for name in weights if "router" in name)
    assert not torch.allclose(weights[router], unbalanced[router], atol=1e-4)


@pytest.mark.parametrize("share", SHARES)
def test_merging_a_routed_adapter_is_refused_with_the_alternatives(share):
    model = get_peft_model(llama(), config(share=share))
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, layers(model)[0].merge):
        with pytest.raises(MergeError, match=r"num_experts=3.*token.*from_pretrained.*braidlora export"):
            merge()
    assert torch.equal(logits(model), expected), "nothing was changed"


def test_one_of_two_active_adapters_is_routed():
    model = get_peft_model(llama(), config(num_experts=1))
    model.add_adapter("routed", config())
    model.base_model.set_adapter(["default", "routed"])
    expected = logits(model)
    with pytest.raises(MergeError, match="'routed'"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected), "the first adapter must not have been merged"
    model.merge_adapter(adapter_names=["default"])
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("safe", [False, True])
def test_one_expert_merges_exactly_as_lora_does(architecture, safe):
    if architecture == "llama":
        base = llama().double()
    else:
        torch.manual_seed(0)
        base = GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        ).double()
    before = logits(base)
    targets = None if architecture == "gpt2" else ["q_proj", "v_proj"]
    model = get_peft_model(base, config(num_experts=1, target_modules=targets))
    expected = logits(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, atol=1e-12, rtol=0)
    merged = model.merge_and_unload(safe_merge=safe)
    assert layers(merged) == []
    torch.testing.assert_close(logits(merged), expected, atol=1e-12, rtol=0)


def test_safe_merge_refuses_what_is_not_finite():
    model = get_peft_model(llama(), config(num_experts=1))
    layer = layers(model)[0]
    weight = layer.base_layer.weight.detach().clone()
    layer.braidlora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


def test_unload_gives_the_base_back():
    base = llama()
    before, names = logits(base), [name for name, _ in base.named_parameters()]
    restored = get_peft_model(base, config()).unload()
    assert layers(restored) == []
    assert [name for name, _ in restored.named_parameters()] == names
    assert torch.equal(logits(restored), before)


def test_offloaded_adapter_weights():
    """accelerate keeps placeholders in the modules and fills them around a call; they may not be read directly."""
    from accelerate import cpu_offload

    model = get_peft_model(llama(), config())
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert layers(model)[0].braidlora_A["default"].weight.device.type == "meta"
    torch.testing.assert_close(logits(model), expected)


def test_parametrised_adapter_weights():
    model = get_peft_model(llama(), config())
    linear = layers(model)[0].braidlora_A["default"]
    before = logits(model)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(linear, "weight", Double())
    after = logits(model)
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    assert not torch.equal(after, before)
    torch.testing.assert_close(logits(model), after)


def test_a_frozen_quantised_like_base_gets_no_in_place_update():
    """A subclass of nn.Linear may return a tensor it keeps."""

    class Keeping(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Keeping(8, 8)

        def forward(self, x):
            return self.layer(x)

    model = get_peft_model(Model(), MultiLoraConfig(target_modules=["layer"], init_weights=False))
    x = torch.randn(3, 8)
    y = model(x)
    base = model.base_model.model.layer.base_layer
    assert torch.equal(base.kept, nn.functional.linear(x, base.weight, base.bias))
    assert not torch.equal(base.kept, y)


def test_trainable_parameters_beside_lora():
    """share="B", N experts: N·r·k + N·k + d·r, against r·k + d·r of a LoRA."""
    ours = get_peft_model(llama(), config(r=8, target_modules=["o_proj"])).get_nb_trainable_parameters()[0]
    lora = get_peft_model(llama(), LoraConfig(r=8, target_modules=["o_proj"])).get_nb_trainable_parameters()[
        0
    ]
    assert lora == 2 * (8 * 32 + 32 * 8)
    assert ours == 2 * (3 * 8 * 32 + 3 * 32 + 32 * 8)
