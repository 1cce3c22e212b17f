"""Adapters on stacked experts: exact beside a float64 reference and PEFT's LoRA, and all that PEFT users do."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from moe_models import (
    EXPERTS,
    IDS,
    MODELS,
    adapter_blocks,
    experts_of,
    gpt_oss,
    mixtral,
    qwen3_moe,
    reference_experts,
)
from torch import nn

from braidlora import MultiLoraConfig
from braidlora.adapters import FactoredLoraConfig
from braidlora.adapters._experts import MultiLoraExperts, MultiLoraParameter, Rows, stacked_parameters
from braidlora.errors import ConfigError, MergeError

SHARES = ["B", "A", "none"]


def config(**settings):
    defaults = {
        "r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS,
        "task_type": "CAUSAL_LM", "init_weights": False,
    }  # fmt: skip
    return MultiLoraConfig(**{**defaults, **settings})


def logits(model, ids=IDS):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def parts(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, MultiLoraParameter)}


def adapt(base, **settings):
    torch.manual_seed(1)
    return peft.get_peft_model(base, config(**settings))


def rows_of(experts):
    return Rows(torch.tensor(experts), torch.arange(len(experts)), 4, "eager")


# --- the mathematics


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_equals_one_token_at_a_time_in_float64(kind, share, implementation):
    """Result, and the gradients of everything: x, routing weights, A's, router, B's, biases."""
    model = adapt(MODELS[kind](implementation=implementation).double(), share=share, num_experts=3).double()
    layer = experts_of(model.base_model.model)
    assert isinstance(layer, MultiLoraExperts)
    base = layer.base_layer
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    torch.manual_seed(2)
    x = (3 * torch.randn(7, 32, dtype=torch.float64)).requires_grad_()
    index = torch.stack([torch.randperm(base.num_experts)[:2] for _ in range(7)])
    index[index == 1] = 0  # an expert without rows; a token may then meet one twice, which is legal too
    routing = torch.rand(7, 2, dtype=torch.float64).requires_grad_()
    weights = dict(base.named_parameters())
    adapters = {name: adapter_blocks(part) for name, part in layer.adapted().items()}
    assert set(adapters) == {"gate_up_proj", "down_proj"}
    expected = reference_experts(kind, weights, adapters, x, index, routing)
    given = layer(x, index, routing)
    assert torch.allclose(given, expected, rtol=1e-12, atol=1e-12)

    wrt = [x, routing, *(p for p in layer.parameters())]
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(given, wrt, upstream, allow_unused=True),
        torch.autograd.grad(expected, wrt, upstream, allow_unused=True),
        strict=True,
    ):
        assert one is not None
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_agree_with_the_loop(kind, dtype):
    """transformers' default implementation; odd ranks, so that rows are no multiple of 16 bytes."""
    results = []
    for implementation in ("eager", "grouped_mm"):
        model = adapt(MODELS[kind](implementation=implementation).to(dtype), r=3)
        layer = experts_of(model.base_model.model)
        torch.manual_seed(2)
        x = torch.randn(9, 32, dtype=dtype).requires_grad_()
        index, routing = torch.randint(4, (9, 2)), torch.rand(9, 2, dtype=dtype)
        y = layer(x, index, routing)
        wrt = [x, *(p for p in layer.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y, wrt, torch.randn_like(y))])
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= tolerance * (1 + other.abs().max())


@pytest.mark.parametrize("kind", MODELS)
def test_one_expert_is_pefts_lora(kind):
    """N = 1 and copied factors: logits and gradients of PEFT's LoRA with target_parameters."""
    ours = adapt(MODELS[kind]().double(), num_experts=1).double()
    theirs = peft.get_peft_model(
        MODELS[kind]().double(),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS),
    ).double()
    pairs = []
    for name, layer in ours.named_modules():
        if isinstance(layer, MultiLoraParameter):
            wrapper = theirs.get_submodule(name.rpartition(".")[0])
            while wrapper.parameter_name != layer.parameter_name:
                wrapper = wrapper.base_layer
        elif hasattr(layer, "braidlora_A"):
            wrapper = theirs.get_submodule(name)
        else:
            continue
        E = getattr(layer, "blocks", 1)
        A, B = layer.braidlora_A["default"].weight, layer.braidlora_B["default"].weight
        wrapper.lora_A["default"].weight.data = A.detach().clone()
        # PEFT has the expert as the inner index of B's columns.
        wrapper.lora_B["default"].weight.data = (
            B.detach().view(len(B), E, -1).transpose(1, 2).reshape(len(B), -1).clone()
        )
        pairs.append((A, B, E, wrapper))
    assert len(pairs) == 8
    results = [model(input_ids=IDS).logits for model in (ours, theirs)]
    assert (results[0] - results[1]).abs().max() < 1e-12 * results[1].abs().max()
    for result in results:
        result.square().sum().backward()
    for A, B, E, wrapper in pairs:
        grad_B = wrapper.lora_B["default"].weight.grad.view(len(B), -1, E).transpose(1, 2).reshape(len(B), -1)
        assert torch.allclose(A.grad, wrapper.lora_A["default"].weight.grad, rtol=1e-9, atol=1e-9)
        assert torch.allclose(B.grad, grad_B, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_zero_init_changes_no_bit(kind, implementation):
    base = MODELS[kind](implementation=implementation)
    before = logits(base)
    assert torch.equal(logits(adapt(base, init_weights=True)), before)


_M = transformers.models
OTHERS = {
    "qwen2_moe": (_M.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts, "num_experts", "moe_intermediate_size"),
    "olmoe": (_M.olmoe.modeling_olmoe.OlmoeExperts, "num_experts", "intermediate_size"),
    "no gate": (
        _M.nemotron_h.modeling_nemotron_h.NemotronHExperts,
        "n_routed_experts",
        "moe_intermediate_size",
    ),
}


class Settings:
    """Whatever an experts class asks its configuration for."""

    _experts_implementation = "eager"
    hidden_act = mlp_hidden_act = "silu"
    hidden_size, intermediate_size, moe_intermediate_size = 16, 24, 24
    num_experts = num_local_experts = n_routed_experts = 4
    moe_latent_size = None


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_other_classes_of_transformers_interface(name, implementation):
    torch.manual_seed(0)
    experts = OTHERS[name][0](Settings())
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts.config._experts_implementation = implementation
    model = nn.ModuleDict({"experts": experts})
    x, index, routing = torch.randn(9, 16), torch.randint(4, (9, 2)), torch.rand(9, 2)
    names = [f"experts.{parameter}" for parameter in stacked_parameters(experts)]
    before = experts(x, index, routing)
    adapted = peft.get_peft_model(
        model, config(target_modules=None, target_parameters=names, init_weights=True, task_type=None)
    )
    assert torch.allclose(adapted.base_model.model["experts"](x, index, routing), before, atol=1e-6)
    for part in parts(adapted).values():
        nn.init.normal_(part.braidlora_B["default"].weight)
    assert not torch.allclose(adapted.base_model.model["experts"](x, index, routing), before, atol=1e-2)


# --- what users of PEFT do with them


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


def test_dropout_keeps_the_mean():
    model = adapt(mixtral(), lora_dropout=0.3, target_modules=[], target_parameters=["experts.down_proj"])
    part = experts_of(model.base_model.model).down_proj.train()
    x, rows = torch.randn(6, 24), rows_of([0, 0, 1, 2, 2, 3])
    with torch.no_grad():
        mean = torch.stack([part(x, rows) for _ in range(4000)]).mean(0)
        part.eval()
        exact = part(x, rows)
    assert (mean - exact).abs().max() < 0.1 * exact.abs().max()


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


def test_torch_compile():
    model = adapt(mixtral(implementation="grouped_mm"))
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(input_ids=IDS).logits, expected, atol=1e-4)
    layer = experts_of(model.base_model.model)
    inputs = (torch.randn(5, 32), torch.randint(4, (5, 2)), torch.rand(5, 2))
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(whole(*inputs), layer(*inputs), atol=1e-5)


def test_balance_loss_evens_out_the_routers():
    """Each base expert's router is pulled towards even use, with the strength of one linear layer's in all."""
    base = mixtral()
    model = adapt(base, target_modules=[], target_parameters=["experts.down_proj"], balance_loss=0.5).train()
    part = experts_of(model.base_model.model).down_proj
    rows = rows_of([0, 0, 0, 2, 2])
    x = torch.randn(5, 24)
    router = part.braidlora_router["default"].weight
    (grad,) = torch.autograd.grad(part(x, rows).sum() * 0.0, router)
    w = part.routing(x, rows, "default")
    mean = [w[:3].mean(0), w[3:].mean(0)]
    loss = sum(share * (3 * p.square().sum() - 1) for share, p in zip((0.6, 0.4), mean, strict=True))
    (expected,) = torch.autograd.grad(0.5 * loss, router)
    assert torch.allclose(grad, expected, atol=1e-6)
    assert expected.any()


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
            r"'experts\.gate_proj' match no parameter\. Those of this model: experts\.down_proj, ",
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
