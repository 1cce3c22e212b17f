"""Adapters of stacked experts as a plain LoRA: PEFT alone loads it, and it is the adapter where that is exact."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from moe_models import EXPERTS, IDS, MODELS, adapter_blocks, experts_of, mixtral, qwen3_moe
from safetensors.torch import load_file

from braidlora import MultiLoraConfig
from braidlora.adapters import multi_to_lora
from braidlora.adapters._experts import MultiLoraParameter
from braidlora.adapters.router_means import router_means
from braidlora.analysis.factors import AdapterFile
from braidlora.errors import CheckpointError
from braidlora.export.run import export


def saved(base, folder, **settings):
    torch.manual_seed(1)
    defaults = {
        "r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS, "task_type": "CAUSAL_LM",
        "init_weights": False, "lora_dropout": 0.1,
    }  # fmt: skip
    model = peft.get_peft_model(base.double(), MultiLoraConfig(**{**defaults, **settings})).double().eval()
    model.save_pretrained(folder)
    return model


def loaded_by_peft(base, folder):
    model = peft.PeftModel.from_pretrained(base.double(), folder, autocast_adapter_dtype=False).eval()
    assert type(model.peft_config["default"]) is peft.LoraConfig
    assert set(load_file(folder / "adapter_model.safetensors")) == set(peft.get_peft_model_state_dict(model))
    return model.double()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["experts.gate_up_proj"], "use_rslora": True},
        {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 5.0}},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj"]},
    ],
    ids=["both", "down", "gate_up", "patterns", "one layer"],
)
def test_one_expert_is_exact(kind, settings, tmp_path):
    expected = logits(saved(MODELS[kind](), tmp_path / "adapter", num_experts=1, **settings))
    record = export(tmp_path / "adapter")
    assert record["exact"]
    given = logits(loaded_by_peft(MODELS[kind](), tmp_path / "adapter-lora"))
    assert torch.allclose(given, expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out")
def test_all_linear_of_one_expert_is_exact(tmp_path):
    settings = {"target_modules": "all-linear", "target_parameters": None, "num_experts": 1}
    expected = logits(saved(mixtral(), tmp_path / "adapter", **settings))
    export(tmp_path / "adapter")
    assert torch.allclose(logits(loaded_by_peft(mixtral(), tmp_path / "adapter-lora")), expected, atol=1e-10)


@pytest.mark.parametrize("share", ["B", "A", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_fixed_weights_per_expert_of_the_base(kind, share, tmp_path):
    """ΔW[e] = s Σ wᵢ Bᵢ Aᵢ for every expert of the base, with weights of its own."""
    model = saved(MODELS[kind](), tmp_path, share=share, num_experts=3)
    parts = {n: p for n, p in model.get_base_model().named_modules() if isinstance(p, MultiLoraParameter)}
    torch.manual_seed(4)
    weights = {name: torch.softmax(torch.randn(part.blocks, 3).double(), -1) for name, part in parts.items()}
    weights |= {f"model.layers.{i}.self_attn.q_proj": torch.full((3,), 1 / 3).double() for i in range(2)}
    tensors, config = multi_to_lora(
        load_file(tmp_path / "adapter_model.safetensors"), model.peft_config["default"], weights
    )
    lora = peft.get_peft_model(MODELS[kind]().double(), config).double()
    outcome = peft.set_peft_model_state_dict(lora, tensors)
    assert not outcome.unexpected_keys
    for layer in range(2):
        wrapper = experts_of(lora.base_model.model, layer)
        while hasattr(wrapper, "parameter_name"):
            name = f"model.layers.{layer}.mlp.experts.{wrapper.parameter_name}"
            blocks = adapter_blocks(parts[name])
            A, B, w = blocks["A"], blocks["B"], weights[name]
            expected = sum(
                blocks["scaling"] * w[:, i, None, None] * (B[:, i % B.shape[1]] @ A[:, i % A.shape[1]])
                for i in range(3)
            )
            given = wrapper.get_delta_weight("default")
            assert torch.allclose(given.mT if kind == "gpt_oss" else given, expected, atol=1e-12)
            wrapper = wrapper.base_layer


def test_uniform_weights_through_the_verb(tmp_path):
    saved(mixtral(), tmp_path / "adapter", num_experts=2)
    record = export(tmp_path / "adapter", static_weights="uniform")
    assert not record["exact"]
    config = json.loads((tmp_path / "adapter-lora/adapter_config.json").read_text())
    assert config["target_parameters"] == [
        f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("down_proj", "gate_up_proj")
    ]
    assert config["lora_dropout"] == 0.0


def test_router_means_of_each_expert_leave_padding_out(tmp_path):
    model = saved(mixtral(), tmp_path, num_experts=3)
    part = experts_of(model.base_model.model, 1).down_proj
    seen = []
    part.register_forward_pre_hook(lambda module, args: seen.append(args))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    means, tokens = router_means(model, [{"input_ids": IDS, "attention_mask": mask}])
    assert tokens == 10
    x, rows = seen[0]
    router = part.braidlora_router["default"].weight.detach().view(4, 3, -1)
    for e in range(4):
        own = [
            torch.softmax(router[e] @ x[s], 0)
            for s in range(len(x))
            if rows.expert_S[s] == e and mask.flatten()[rows.token_S[s]]
        ]
        expected = torch.stack(own).mean(0) if own else torch.full((3,), 1 / 3).double()
        assert torch.allclose(means["model.layers.1.mlp.experts.down_proj"].weights[e], expected, atol=1e-9)
    assert means["model.layers.1.self_attn.q_proj"].weights.shape == (3,)


@pytest.mark.filterwarnings("ignore:target_modules='all-linear' leaves out")
def test_what_peft_would_take_for_experts_is_refused(tmp_path):
    """qwen3_moe with a dense layer: its down_proj is a linear layer, which PEFT turns into a target parameter."""
    base = qwen3_moe(mlp_only_layers=[0])
    saved(base, tmp_path / "adapter", num_experts=1, target_modules="all-linear", target_parameters=None)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.down_proj: PEFT mistakes linear layers of this name"
    ):
        export(tmp_path / "adapter")


@pytest.mark.parametrize("num_experts", [1, 3])
def test_analysis_leaves_experts_out(num_experts, tmp_path):
    saved(mixtral(), tmp_path / "adapter", num_experts=num_experts)
    names = [layer.name for layer in AdapterFile(tmp_path / "adapter", "a").layers]
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    if num_experts == 1:
        export(tmp_path / "adapter")
        assert [layer.name for layer in AdapterFile(tmp_path / "adapter-lora", "a").layers] == names
    saved(mixtral(), tmp_path / "only", num_experts=num_experts, target_modules=[])
    with pytest.raises(CheckpointError, match="only the base's stacked experts"):
        AdapterFile(tmp_path / "only", "a")
