"""Adapters on stacked experts: what users of PEFT and transformers do with them, and what is refused."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from moe_models import (
    EXPERTS,
    IDS,
    MODELS,
    adapt,
    config,
    experts_of,
    gpt_oss,
    logits,
    mixtral,
    parts,
    qwen3_moe,
)
from torch import nn

from braidlora import MultiLoraConfig
from braidlora.adapters import FactoredLoraConfig
from braidlora.errors import ConfigError, MergeError

SHARES = ["B", "A", "none"]


@pytest.mark.parametrize("share", SHARES)
def test_tensors_as_documented(share):
    state = peft.get_peft_model_state_dict(adapt(mixtral(), share=share, num_experts=3))
    name = "base_model.model.model.layers.1.mlp.experts.gate_up_proj.braidlora_{}.weight"
    E, N, r = 4, 3, 4
    assert state[name.format("A")].shape == (E * r * (1 if share == "A" else N), 32)
    assert state[name.format("router")].shape == (E * N, 32)
    assert state[name.format("B")].shape == (48, E * r * (1 if share == "B" else N))
    assert not [key for key in state if "base_layer" in key]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_are_equal_to_the_bit(kind, low_cpu_mem_usage, tmp_path):
    model = adapt(MODELS[kind]())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_transformers_load_and_delete_adapter(tmp_path):
    model = adapt(mixtral())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = mixtral()
    before = logits(base)
    base.load_adapter(tmp_path, adapter_name="experts_too")
    assert torch.equal(logits(base), expected)
    base.delete_adapter("experts_too")
    assert torch.equal(logits(base), before)


def test_second_adapter_with_targets_and_sizes_of_its_own(tmp_path):
    """Where PEFT's LoRA asks all adapters to name the same parameters."""
    first = adapt(mixtral())
    first_logits = logits(first)
    first.save_pretrained(tmp_path / "first")
    second_config = config(
        target_modules=["o_proj"], target_parameters=["experts.down_proj"], num_experts=2, r=3, share="A"
    )
    torch.manual_seed(5)
    second = peft.get_peft_model(mixtral(), second_config)
    second_logits = logits(second)
    second.save_pretrained(tmp_path / "second")

    model = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "first")
    model.load_adapter(tmp_path / "second", "other")
    assert torch.equal(logits(model), first_logits)
    model.set_adapter("other")
    assert torch.equal(logits(model), second_logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.allclose(both, first_logits)
    assert not torch.allclose(both, second_logits)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first_logits)
    assert not [name for name in model.state_dict() if ".other." in name]


def test_disable_unload_and_deepcopy():
    base = mixtral()
    before = logits(base)
    model = adapt(base)
    adapted = logits(model)
    assert not torch.allclose(adapted, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    other = copy.deepcopy(model)
    for name, part in parts(other).items():
        assert part.base_layer is other.get_submodule(name.rpartition(".")[0]).base_layer
        nn.init.zeros_(part.braidlora_B["default"].weight)
    assert torch.equal(logits(model), adapted)
    assert not torch.equal(logits(other), adapted)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), before)
    assert type(experts_of(unloaded)).__name__ == "MixtralExperts"


@pytest.mark.parametrize("kind", MODELS)
def test_one_expert_merges(kind):
    model = adapt(MODELS[kind]().double(), num_experts=1).double()
    expected = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-11)
    with model.disable_adapter():  # takes it out again
        assert not torch.allclose(logits(model), expected, atol=1e-3)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-11)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-11)
    assert not [name for name, _ in merged.named_parameters() if "braidlora" in name]


def test_merging_a_routed_adapter_is_refused_and_changes_nothing():
    model = adapt(mixtral(), target_modules=[])
    expected = logits(model)
    with pytest.raises(MergeError, match="num_experts=3 and cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        model = adapt(MODELS[kind]()).train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all("experts" not in n or g is not None for n, g in gradients[0].items())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_bf16_base_with_float32_adapter(implementation):
    model = adapt(gpt_oss(implementation=implementation).to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        result = model(input_ids=IDS, labels=IDS)
    result.loss.backward()
    exact = logits(adapt(gpt_oss()))
    assert (result.logits.float() - exact).abs().max() < 0.1 * exact.abs().max()
    moved = [p for n, p in model.named_parameters() if "experts" in n and p.grad is not None and p.grad.any()]
    assert len(moved) == 12


def test_autocast_of_a_float32_base():
    model = adapt(mixtral())
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        given = logits(model)
    assert (given.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("mask", ["shared", "per_expert"])
def test_dropout_acts_in_training_only(mask):
    model = adapt(mixtral(), lora_dropout=0.5, dropout_mask=mask, target_modules=[])
    expected = logits(adapt(mixtral(), target_modules=[]))
    assert torch.equal(logits(model), expected)
    layer = experts_of(model.base_model.model).train()
    x, index, routing = torch.randn(5, 32), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
    with torch.no_grad():
        mean = torch.stack([layer(x, index, routing) for _ in range(2)])
    assert not torch.equal(mean[0], mean[1])


def test_rank_and_alpha_patterns():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = adapt(
            mixtral(), rank_pattern={"gate_up_proj": 2}, alpha_pattern={r"layers\.1\..*down_proj": 6}
        )
    found = {name.removeprefix("base_model.model.model."): part for name, part in parts(model).items()}
    assert {name: (p.r["default"], p.scaling["default"]) for name, p in found.items()} == {
        "layers.0.mlp.experts.gate_up_proj": (2, 8.0),
        "layers.0.mlp.experts.down_proj": (4, 4.0),
        "layers.1.mlp.experts.gate_up_proj": (2, 8.0),
        "layers.1.mlp.experts.down_proj": (4, 1.5),
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": [1]}, {1}),
        ({"exclude_modules": ["model.layers.0.mlp.experts"]}, {1}),
        ({"exclude_modules": r".*layers\.1.*"}, {0}),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, {1}),
    ],
)
def test_layers_and_exclusions(settings, expected):
    found = parts(adapt(mixtral(), **settings))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in found} == expected


def test_trainer_with_generation(tmp_path):
    model = adapt(qwen3_moe(implementation="grouped_mm"), init_weights=True)
    rows = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(part.braidlora_B["default"].weight.any() for part in parts(model).values())
    with torch.no_grad():
        given = model.eval().generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert given.shape[1] > IDS.shape[1]


def test_adapter_weights_behind_a_hook_are_called():
    """What FSDP and offloading do: the weight may be read in a call of its module only."""
    model = adapt(mixtral())
    expected = logits(model)
    calls = []
    for part in parts(model).values():
        for linear in (
            part.braidlora_A["default"],
            part.braidlora_router["default"],
            part.braidlora_B["default"],
        ):
            linear.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert len(calls) == 3 * 4


# --- all-linear, and what is refused


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_all_linear_adapts_the_experts_that_pefts_lora_adapts(kind):
    lora = peft.get_peft_model(MODELS[kind](), peft.LoraConfig(r=4, target_modules="all-linear"))
    with pytest.warns(UserWarning, match=r"leaves out model\.layers\.\*\.mlp\.gate\.weight \(2\)"):
        ours = peft.get_peft_model(
            MODELS[kind](), MultiLoraConfig(r=4, num_experts=1, target_modules="all-linear")
        )
    theirs = {n: p.numel() for n, p in lora.named_parameters() if p.requires_grad and ".gate." not in n}
    assert sum(theirs.values()) == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert sorted(ours.peft_config["default"].target_parameters) == ["down_proj", "gate_up_proj"]
    gate_up = next(part for name, part in parts(ours).items() if name.endswith("gate_up_proj"))
    assert (gate_up.r["default"], gate_up.scaling["default"]) == (8, 4.0)


def test_all_linear_is_saved_as_what_it_was(tmp_path):
    with pytest.warns(UserWarning, match="leaves out"):
        model = adapt(mixtral(), target_modules="all-linear", target_parameters=None)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(mixtral(), tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_a_rank_of_ones_own_stands_under_all_linear():
    with pytest.warns(UserWarning, match="leaves out"):
        model = adapt(
            mixtral(), target_modules="all-linear", target_parameters=None, rank_pattern={"gate_up_proj": 3}
        )
    assert {part.r["default"] for name, part in parts(model).items() if name.endswith("gate_up_proj")} == {3}


def test_all_linear_names_experts_that_pefts_lora_leaves_out_too():
    with pytest.warns(UserWarning, match="as PEFT's LoRA does") as seen:
        model = peft.get_peft_model(gpt_oss(), MultiLoraConfig(target_modules="all-linear"))
    assert not parts(model)
    text = " ".join(str(warning.message) for warning in seen)
    assert "model.layers.*.mlp.experts.down_proj (2)" in text
    assert "target_parameters=['experts.down_proj', 'experts.gate_up_proj']" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapt(gpt_oss(), target_modules="all-linear")


def test_factored_adapters_name_the_experts_they_leave_out():
    with pytest.warns(
        UserWarning, match=r"experts\.gate_up_proj \(2\).* not supported by FactoredLoraConfig"
    ):
        peft.get_peft_model(mixtral(), FactoredLoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="a factored LoRA adapts linear layers only"):
        FactoredLoraConfig(target_parameters=EXPERTS)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["mlp.gate.weight"],
            r"'model\.layers\.0\.mlp\.gate\.weight' \(4, 32\) of a MixtralTopKRouter, which cannot be",
        ),
        (["q_proj.weight"], r"belongs to a linear layer: name 'q_proj' in target_modules"),
        (
            ["experts.gate_proj"],
            r"'experts\.gate_proj' match no parameter\. This model has: experts\.down_proj, ",
        ),
    ],
)
def test_parameters_that_cannot_be_adapted(targets, said):
    model = mixtral()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=said):
        adapt(model, target_modules=[], target_parameters=targets)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_one_of_several_names_matches_nothing():
    with pytest.warns(UserWarning, match=r"'experts\.up_proj' match no parameter"):
        model = adapt(mixtral(), target_parameters=["experts.down_proj", "experts.up_proj"])
    assert len(parts(model)) == 2


@pytest.mark.parametrize("value", ["experts.down_proj", [3]])
def test_target_parameters_must_be_a_list_of_names(value):
    with pytest.raises(ConfigError, match="must be a list of parameter names"):
        MultiLoraConfig(target_parameters=value)


def test_a_kernel_that_reads_the_parameters_fails_loudly():
    """A fused kernel in place of the block would read the adapted parameters past the adapter."""
    layer = experts_of(adapt(gpt_oss()).base_model.model)
    assert layer.num_experts == 4  # other attributes are the module's
    assert isinstance(layer.gate_up_proj, nn.Module)
    with pytest.raises(TypeError):
        torch.zeros(1) @ layer.gate_up_proj


def test_expert_parallelism_is_refused():
    layer = experts_of(adapt(mixtral()).base_model.model)
    layer.base_layer._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="expert parallelism"):
        layer(torch.randn(2, 32), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_a_module_with_accelerates_hooks():
    """A device map hangs a hook on the experts, which moves their inputs; with offloading there is nothing to read."""
    expected = logits(adapt(mixtral()))
    base = mixtral()
    add_hook_to_module(experts_of(base), AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(logits(adapt(base)), expected)
    base = mixtral()
    stored = {name: tensor.clone() for name, tensor in experts_of(base).state_dict().items()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=stored)
    add_hook_to_module(experts_of(base), hook)
    with pytest.raises(NotImplementedError, match="offloaded experts are not supported"):
        logits(adapt(base))


@pytest.mark.parametrize("bias", ["none", "all", "braidlora_only"])
def test_what_is_trained_is_saved(bias):
    model = adapt(gpt_oss(), bias=bias)
    trained = {n.replace(".default", "") for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(peft.get_peft_model_state_dict(model))


def test_status():
    status = {layer.name: layer for layer in adapt(mixtral()).get_layer_status()}
    layer = status["model.model.layers.0.mlp.experts.down_proj"]
    assert (layer.module_type, layer.active_adapters, layer.enabled) == (
        "MultiLoraParameter",
        ["default"],
        True,
    )


def test_batches_of_mixed_adapters():
    """As for all experts: an adapter on them cannot be mixed, others can stand beside it."""
    model = adapt(mixtral(), target_parameters=None)
    model.add_adapter("experts_too", config())
    model.eval()
    with pytest.raises(ValueError, match=r"experts_too adapt 'model\.model\.layers\.0\.mlp\.experts"):
        model(input_ids=IDS, adapter_names=["default", "experts_too"])
    model.set_adapter("default")
    expected = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    model.set_adapter("experts_too")
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    assert torch.allclose(mixed, torch.stack([expected[0], plain[1]]), atol=1e-5)
