"""The factored LoRA: against its formula in float64, its price, life under PEFT, and its plain LoRA."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from accounting import FullWidthTraffic, saved_for_backward
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
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
)  # fmt: skip
from transformers.pytorch_utils import Conv1D

from braidlora import FactoredLoraConfig, FactoredLoraLayer, FactoredLoraModel
from braidlora.adapters.factored_lora import factored_to_lora, to_plain_lora
from braidlora.errors import CheckpointError, ConfigError, MergeError

K, D, R, M_RANK = 12, 10, 3, 5
FACTORS = ["A", "M", "B1", "B2", "base"]


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapted(*, bias=True, conv1d=False, dtype=torch.float64, d=D, k=K, r=R, m=M_RANK, **settings):
    """An adapted layer whose factors are all random, W0 (d, k) and the bias."""
    torch.manual_seed(7)
    base = Conv1D(d, k) if conv1d else nn.Linear(k, d, bias=bias)
    if conv1d:
        nn.init.normal_(base.bias)
    settings = {"lora_dropout": 0.0, "init_weights": False, **settings}
    config = FactoredLoraConfig(r=r, r_intermediate=m, target_modules=["layer"], **settings)
    layer = get_peft_model(OneLayer(base.to(dtype)), config).base_model.model.layer
    W0 = base.weight.detach().T if conv1d else base.weight.detach()
    return layer, W0, None if base.bias is None else base.bias.detach()


def weights(layer, name="default"):
    return [getattr(layer, f"factoredlora_{factor}")[name].weight for factor in FACTORS]


def reference(x, W0, bias, A, M, B1, B2, base, scaling, mask=None):
    """METHOD's formula with the update written out as one matrix; no code of the package."""
    update = scaling * torch.einsum("dm,mr,rk->dk", base + torch.einsum("dr,rm->dm", B2, B1), M, A)
    xd = x if mask is None else x * mask
    y = torch.einsum("...k,dk->...d", x, W0) + torch.einsum("...k,dk->...d", xd, update)
    return y if bias is None else y + bias


def assert_equal_to_reference(layer, W0, bias, x, mask=None):
    x = x.clone().requires_grad_()
    factors = weights(layer)
    expected = reference(x, W0, bias, *factors, layer.scaling["default"], mask)
    actual = layer(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    upstream, inputs = torch.randn_like(expected), [x, *factors[:4]]
    ours = torch.autograd.grad(actual, inputs, upstream)
    for one, other in zip(ours, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("base", ["bias", "no bias", "Conv1D"])
def test_forward_and_all_gradients(base, shape, plain, monkeypatch):
    layer, W0, bias = adapted(bias=base != "no bias", conv1d=base == "Conv1D")
    if plain:  # what torch.compile and FSDP go through
        monkeypatch.setattr(layer, "_readable_weights", lambda x, names: None)
    assert_equal_to_reference(layer, W0, bias, torch.randn(*shape, K).double())


@pytest.mark.parametrize(("r", "m"), [(1, 1), (8, 2), (2, 8), (12, 16)])
def test_ranks_below_and_above_the_intermediate(r, m):
    layer, W0, bias = adapted(r=r, m=m)
    assert_equal_to_reference(layer, W0, bias, torch.randn(5, K).double())


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_dropout(plain, monkeypatch):
    layer, W0, bias = adapted(lora_dropout=0.4)
    if plain:
        monkeypatch.setattr(layer, "_readable_weights", lambda x, names: None)
    mask = (torch.rand(6, K) > 0.4).double() / 0.6
    monkeypatch.setattr(torch, "native_dropout", lambda x, p, train: (x * mask, mask != 0))
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p: x * mask)
    layer.train()
    assert_equal_to_reference(layer, W0, bias, torch.randn(6, K).double(), mask)
    layer.eval()
    assert_equal_to_reference(layer, W0, bias, torch.randn(6, K).double())


def test_two_active_adapters_add_up():
    layer, W0, bias = adapted()
    second = FactoredLoraConfig(r_intermediate=2, lora_dropout=0.0, init_weights=False)
    layer.update_layer("second", second, 4, 6.0)
    layer.double()
    layer.set_adapter(["default", "second"])
    x = torch.randn(5, K).double()
    first = reference(x, W0, bias, *weights(layer), layer.scaling["default"])
    both = reference(x, torch.zeros_like(W0), None, *weights(layer, "second"), 1.5) + first
    torch.testing.assert_close(layer(x), both, atol=1e-10, rtol=0)


def test_a_new_adapter_changes_nothing_and_the_base_is_frozen():
    layer, *_ = adapted(init_weights=True, dtype=torch.float32, lora_dropout=0.3)
    x = torch.randn(5, K)
    assert torch.equal(layer(x), layer.base_layer(x))
    A, M, B1, B2, base = weights(layer)
    assert [tuple(w.shape) for w in (A, M, B1, B2, base)] == [
        (R, K),
        (M_RANK, R),
        (R, M_RANK),
        (D, R),
        (D, M_RANK),
    ]
    assert [w.requires_grad for w in (A, M, B1, B2, base)] == [True, True, True, True, False]
    assert torch.count_nonzero(B2) == torch.count_nonzero(base) == 0
    for weight in (A, M, B1):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.5 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_does_not_depend_on_the_factors_and_nothing_of_full_size_is_formed(dtype):
    """x is read once (twice with its gradient), the result is written once: no more than a LoRA of this package."""
    tokens, width = 512, 320
    layer, *_ = adapted(k=width, d=width, r=8, m=16, dtype=dtype, bias=False)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, width, dtype=dtype)

    def units(module):
        x.grad = None
        with FullWidthTraffic(tokens, width, x.element_size()) as account:
            module(x).backward(upstream)
        return account.units

    assert units(layer) - units(layer.base_layer) <= 10.0
    kept, _ = saved_for_backward(layer, x)
    assert all(tensor.numel() < width * width for tensor in kept)
    activations = sum(t.untyped_storage().nbytes() for t in kept if t.shape[0] == tokens)
    assert activations <= tokens * (2 * 8 + 2 * 16 + 8) * x.element_size()


def test_bf16_base_with_float32_adapter():
    layer, W0, bias = adapted(dtype=torch.bfloat16, k=64)
    assert {w.dtype for w in weights(layer)} == {torch.float32}
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    y = layer(x)
    exact = [t.detach().double() for t in (x, W0, bias, *weights(layer))]
    expected = reference(*exact, layer.scaling["default"])
    assert y.dtype == torch.bfloat16
    assert ((y.double() - expected).norm() / expected.norm()).item() < 0.02


def test_autocast():
    layer, W0, bias = adapted(dtype=torch.float32, k=64)
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    exact = [t.detach().double() for t in (x, W0, bias, *weights(layer))]
    expected = reference(*exact, layer.scaling["default"])
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    assert ((y.double() - expected).norm() / expected.norm()).item() < 0.02


def test_compiles_to_one_graph():
    layer, *_ = adapted(dtype=torch.float32)
    torch._dynamo.reset()
    x = torch.randn(2, 8, K)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


class TestConfig:
    def test_type_and_defaults(self):
        config = FactoredLoraConfig()
        assert config.peft_type is PeftType.FACTOREDLORA
        assert (config.r, config.r_intermediate, config.lora_alpha) == (8, 16, 16)

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("r", 0, "at least 1"), ("r_intermediate", 0, "at least 1"), ("r_intermediate", 2.5, "integer"),
            ("lora_alpha", float("nan"), "finite"), ("lora_dropout", 1.0, "[0, 1)"),
            ("bias", "some", "factoredlora_only"), ("target_modules", [], "empty"),
            ("target_parameters", ["w"], "not supported"), ("task_type", "X", "task_type"),
        ],
    )  # fmt: skip
    def test_out_of_range(self, field, value, said):
        with pytest.raises(ConfigError) as error:
            FactoredLoraConfig(**{field: value})
        assert "FactoredLoraConfig" in str(error.value)
        assert field in str(error.value)
        assert said in str(error.value)

    def test_round_trip(self, tmp_path):
        config = FactoredLoraConfig(
            r=2, r_intermediate=4, target_modules=["q_proj"], rank_pattern={"q_proj": 3}
        )
        config.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert type(loaded) is FactoredLoraConfig
        assert loaded.to_dict() == config.to_dict()

    def test_is_registered(self):
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.FACTOREDLORA] is FactoredLoraModel
        assert PeftType("FACTOREDLORA") is PeftType.FACTOREDLORA

    @pytest.mark.parametrize("target", ["norm", "embed_tokens"])
    def test_not_a_linear_layer(self, target):
        with pytest.raises(ConfigError, match=f"{target}.*not a linear layer|nothing|not found"):
            get_peft_model(llama(), config(target_modules=[target]))


def config(**settings):
    defaults = {"r": 4, "r_intermediate": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return FactoredLoraConfig(**{**defaults, "init_weights": False, **settings})


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, FactoredLoraLayer)]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_zero_init_identity():
    base = llama()
    before = logits(base)
    model = get_peft_model(base, config(init_weights=True))
    assert torch.equal(logits(model), before)
    assert len(layers(model)) == 4
    assert len(trainable(model)) == 4 * 4
    assert not any("base" in name.rpartition("factoredlora_")[2] for name in trainable(model))


def test_save_and_load_are_equal_to_the_bit(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.factoredlora_"
    assert {name for name in saved if name.startswith(prefix)} == {f"{prefix}{f}.weight" for f in FACTORS}
    assert len(saved) == 4 * 5

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(loaded), expected)
    assert trainable(loaded) == trainable(model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    lazy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lazy = PeftModel.from_pretrained(lazy, tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(lazy), expected)

    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "adapter"), adapter_name="mine")
    assert torch.equal(logits(native), expected)
    native.delete_adapter("mine")
    assert torch.equal(logits(native), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))


def test_second_adapter_and_switching_keep_every_base_frozen(tmp_path):
    model = get_peft_model(llama(), config())
    first, trained = logits(model), trainable(model)
    model.add_adapter("second", config(r=2, r_intermediate=3, target_modules=["v_proj", "up_proj"]))
    assert trainable(model) == trained
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    chosen = trainable(model)
    assert len(chosen) == 4 * 4
    assert all(".second." in name and "factoredlora_base" not in name for name in chosen)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, adapter_name="default")
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)
    loaded.delete_adapter("second")
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), first)
    assert all(
        "second" not in layer.factoredlora_base and "second" not in layer.r for layer in layers(loaded)
    )


def test_disable_and_unload():
    base = llama()
    before, names = logits(base), [name for name, _ in base.named_parameters()]
    model = get_peft_model(base, config())
    adapted_logits = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted_logits)
    restored = model.unload()
    assert [name for name, _ in restored.named_parameters()] == names
    assert torch.equal(logits(restored), before)


def test_modules_to_save(tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, config(task_type="SEQ_CLS", modules_to_save=["score"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(untouched, tmp_path)), expected)


def test_patterns():
    settings = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5.0}, "use_rslora": True}
    attention = get_peft_model(llama(), config(**settings)).base_model.model.model.layers[0].self_attn
    assert attention.v_proj.factoredlora_A["default"].weight.shape == (2, 32)
    assert attention.v_proj.scaling["default"] == pytest.approx(5 / math.sqrt(2))
    assert attention.q_proj.scaling["default"] == pytest.approx(16 / math.sqrt(4))


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(1, 64, (24, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def test_trainer_with_gradient_checkpointing_leaves_the_base_alone(tmp_path):
    model = get_peft_model(llama(), config())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=24, learning_rate=5e-2, save_strategy="no",
        gradient_checkpointing=True, report_to=[], seed=3, use_cpu=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == trainable(model)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("architecture", [llama, gpt2])
def test_merge_is_exact(architecture, safe):
    base = architecture().double()
    before = logits(base)
    targets = None if architecture is gpt2 else ["q_proj", "v_proj"]
    model = get_peft_model(base, config(target_modules=targets))
    expected = logits(model)
    assert not torch.allclose(expected, before)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, atol=1e-12, rtol=0)
    merged = model.merge_and_unload(safe_merge=safe)
    assert layers(merged) == []
    torch.testing.assert_close(logits(merged), expected, atol=1e-12, rtol=0)


def test_merges_that_are_refused():
    model = get_peft_model(llama(), config())
    layer = layers(model)[0]
    weight = layer.base_layer.weight.detach().clone()
    layer.factoredlora_B2["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)

    class Quantised(nn.Module):
        in_features = out_features = 4

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.to(x.dtype).T

    quantised = get_peft_model(OneLayer(Quantised()), FactoredLoraConfig(target_modules=["layer"]))
    quantised(torch.randn(2, 4)).sum().backward()
    with pytest.raises(MergeError, match="load the base model unquantized"):
        quantised.merge_adapter()


def test_plain_lora_of_rank_m_is_the_same_layer():
    torch.manual_seed(1)
    sizes = {"A": (R, K), "M": (M_RANK, R), "B1": (R, M_RANK), "B2": (D, R), "base": (D, M_RANK)}
    A, M, B1, B2, base = (torch.randn(*size, dtype=torch.float64) for size in sizes.values())
    A_plain, B_plain = to_plain_lora(A, M, B1, B2, base)
    assert (A_plain.shape, B_plain.shape) == ((M_RANK, K), (D, M_RANK))
    torch.testing.assert_close(B_plain @ A_plain, (base + B2 @ B1) @ M @ A, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 10.0},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3.0}},
        {"target_modules": "all-linear", "lora_alpha": 8.0},
    ],
    ids=["plain", "rslora", "patterns", "all-linear"],
)
def test_conversion_loads_with_peft_alone(settings, tmp_path):
    model = get_peft_model(llama().double(), config(**settings))
    expected = logits(model)
    model.save_pretrained(tmp_path / "factored")
    tensors, lora = factored_to_lora(
        load_file(tmp_path / "factored" / "adapter_model.safetensors"),
        PeftConfig.from_pretrained(tmp_path / "factored"),
    )
    assert type(lora) is LoraConfig
    assert lora.r == 6
    if not settings:
        assert lora.lora_alpha == 16 / 4 * 6
        assert lora.alpha_pattern == {}
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    lora.save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path / "lora", autocast_adapter_dtype=False)
    assert layers(loaded) == []
    torch.testing.assert_close(logits(loaded), expected, atol=1e-12, rtol=0)

    if settings:
        return  # once is enough for what starts another interpreter
    script = (
        "import sys, peft\n"
        f"c = peft.PeftConfig.from_pretrained({str(tmp_path / 'lora')!r})\n"
        "assert type(c) is peft.LoraConfig and 'braidlora' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_incomplete_tensors_are_not_converted():
    tensors = {"base_model.model.l.factoredlora_A.weight": torch.zeros(2, 3)}
    with pytest.raises(CheckpointError, match=r"^l: factoredlora_M, .*factoredlora_base missing"):
        factored_to_lora(tensors, config())
    with pytest.raises(CheckpointError, match="no factored LoRA"):
        factored_to_lora({"base_model.model.l.lora_A.weight": torch.zeros(2, 3)}, config())


def test_a_round_of_the_heterogeneous_rule_keeps_one_clients_model(tmp_path):
    """State dict names of the tuner are those of the rule; the client's function survives aggregation and restart."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from braidlora.federated import ClientUpdate, get_rule

    model = get_peft_model(llama().double(), config())
    expected = logits(model)
    state = get_peft_model_state_dict(model)
    rule = get_rule("fed-alora-het")
    rule.start(state)
    rule.add(ClientUpdate("one", 10, rule.outgoing(state), 4, 4.0))
    shared = rule.finish()
    assert len(shared) == 4
    received = rule.received(rule.payload_for(shared, 4), 4)
    set_peft_model_state_dict(model, {**rule.restart(state, torch.Generator().manual_seed(1)), **received})
    assert all(torch.count_nonzero(layer.factoredlora_B2["default"].weight) == 0 for layer in layers(model))
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=0)
