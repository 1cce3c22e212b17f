"""The table of sharing schemes, and what a new one costs: an entry, and its arithmetic in `functional`."""

import json

import pytest
import torch
import yaml
from expert_loop import expert_loop
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from two_layers import TwoLayers

from braidlora import MultiLoraConfig
from braidlora.adapters import functional, multi_to_lora
from braidlora.adapters.sharing import DEFAULT, LORA, SCHEMES, SharingScheme, by_method
from braidlora.analysis.factors import AdapterFile
from braidlora.analysis.similarity import compare
from braidlora.assets import embedded_base_path
from braidlora.cli import main
from braidlora.comparison import built_in_labels
from braidlora.config import load_config
from braidlora.errors import ConfigError
from braidlora.models.adapter_config import build_adapter_config

N, R = 3, 4


@pytest.mark.parametrize("share", SCHEMES)
def test_the_table_describes_the_blocks_that_the_layer_has(share):
    config = MultiLoraConfig(share=share, num_experts=N, r=R, target_modules=["first"])
    layer = get_peft_model(TwoLayers(), config).base_model.model.first
    rows, columns = layer.braidlora_A.default.weight.shape[0], layer.braidlora_B.default.weight.shape[1]
    assert (rows // R, columns // R) == SCHEMES[share].blocks(N)
    assert SCHEMES[share].share == share


def test_methods_and_shared_factors():
    assert list(by_method()) == ["alora", "hydralora", "moelora", "mtl-lora", "align-lora", "lora"]
    shared = [("B",), ("A",), (), ("A",), ("A", "B"), ("A", "B")]
    assert [scheme.shared for scheme in by_method().values()] == shared
    assert [scheme.title for scheme in SCHEMES.values()] == [
        "ALoRA (shared B)", "HydraLoRA (shared A)", "MoE-LoRA (nothing shared)",
    ]  # fmt: skip
    assert DEFAULT.share == MultiLoraConfig().share
    assert not LORA.router


# A scheme that braidlora does not have: every expert's B reads the sum of all A's,
#     y = W0 x + s·Σᵢ wᵢ(x) Bᵢ (Σⱼ Aⱼ) x
SUM = SharingScheme(
    share="sum",
    method="sumlora",
    label="Sum-LoRA",
    formula="y = W0 x + s·Σᵢ wᵢ(x) Bᵢ (Σⱼ Aⱼ) x",
    static="A = Σ Aᵢ and B = Σ wᵢBᵢ",
    per_expert=("A", "B"),
)


def sum_mix(h_TG, w_TN):
    sum_TR = h_TG.unflatten(-1, (w_TN.shape[-1], -1)).sum(-2)
    return (w_TN.unsqueeze(-1) * sum_TR.unsqueeze(-2)).flatten(-2)


def sum_mix_backward(grad_TU, h_TG, w_TN):
    grad_TNR = grad_TU.to(w_TN.dtype).unflatten(-1, (w_TN.shape[-1], -1))
    sum_TR = h_TG.unflatten(-1, (w_TN.shape[-1], -1)).sum(-2)
    grad_sum_TR = (w_TN.unsqueeze(-1) * grad_TNR).sum(-2)
    return grad_sum_TR.repeat(1, w_TN.shape[-1]), (grad_TNR * sum_TR.unsqueeze(-2)).sum(-1)


def sum_static(A, B, w_N):
    A_NRK, B_DNR = A.unflatten(0, (len(w_N), -1)), B.unflatten(1, (len(w_N), -1))
    return A_NRK.sum(0), (B_DNR * w_N[:, None].to(B.dtype)).sum(1)


@pytest.fixture
def fifth(monkeypatch):
    """Add the scheme as its author would: an entry of the table, and three functions in `functional`."""
    monkeypatch.setitem(SCHEMES, "sum", SUM)
    for name, own in {"mix": sum_mix, "mix_backward": sum_mix_backward, "static_factors": sum_static}.items():
        monkeypatch.setattr(functional, name, with_branch(getattr(functional, name), own))
    return SUM


def with_branch(known, own):
    return lambda *args: own(*args[:-1]) if args[-1] == "sum" else known(*args)


def reference(layer, x):
    """The formula, with no code of the package: experts that all have the sum of the A's."""
    A, router, B = (getattr(layer, f"braidlora_{name}").default.weight for name in ("A", "router", "B"))
    summed = sum(A.split(R))
    base, scaling = layer.base_layer, layer.scaling["default"]
    return expert_loop(x, base.weight, base.bias, summed, router, B, share="A", N=N, scaling=scaling)


@pytest.mark.parametrize("fused", [True, False])
def test_a_fifth_scheme_computes_its_formula(fifth, fused):
    torch.manual_seed(0)
    config = MultiLoraConfig.of_method(
        "sumlora", r=R, lora_dropout=0.0, target_modules=["first", "second"], init_weights=False, fused=fused
    )
    net = get_peft_model(TwoLayers().double(), config).base_model.model.double()
    x = torch.randn(5, net.first.in_features, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in net.parameters() if p.requires_grad)]
    y = net(x)
    expected = reference(net.second, torch.nn.functional.gelu(reference(net.first, x)))
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"path": "embedded"},
        "adapter": {"method": "sumlora", "r": R, "target_modules": ["q_proj", "v_proj"]},
        "prompt": {"template": "{instruction} =", "cutoff": 32},
        "tasks": [{"name": "sum", "train": "generated:sum"}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_fifth_scheme_is_known_to_recipes_plans_and_comparisons(fifth, recipe, capsys):
    config = load_config(recipe)
    made = build_adapter_config(config)
    assert (made.share, made.num_experts, made.lora_dropout) == ("sum", 3, 0.05)
    with pytest.raises(ConfigError, match=r"got 'sunlora'; expected 'alora', .*'sumlora', .*or 'lora'"):
        load_config(recipe, ["adapter.method=sunlora"])
    with pytest.raises(ConfigError, match=r"'sum' \(Sum-LoRA\)"):
        MultiLoraConfig(share="some")
    assert list(built_in_labels()) == [
        "lora", "lora-matched", "mtl-lora", "align-lora", "hydralora", "moelora", "sumlora", "alora",
    ]  # fmt: skip
    assert main(["plan", str(recipe), "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods["sumlora"] == methods["moelora"]  # the same blocks
    assert main(["plan", str(recipe)]) == 0
    assert "Sum-LoRA" in capsys.readouterr().out


def test_a_fifth_scheme_is_saved_loaded_exported_and_analyzed(fifth, tmp_path, capsys):
    torch.manual_seed(1)
    config = MultiLoraConfig(
        share="sum", r=R, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base_path()), config).eval()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    ids = torch.arange(1, 9)[None]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded_base_path()), folder)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)

    out = tmp_path / "lora"
    assert main(["export", str(folder), "--output", str(out), "--static-weights", "0.5,0.3,0.2"]) == 0
    said = capsys.readouterr().out
    assert "Sum-LoRA (nothing shared), 3 experts of rank 4" in said
    assert "A = Σ Aᵢ and B = Σ wᵢBᵢ, a LoRA of rank 4" in said
    tensors = {
        name.replace(".default", ""): t for name, t in model.state_dict().items() if "braidlora_" in name
    }
    lora, lora_config = multi_to_lora(tensors, config, torch.tensor([0.5, 0.3, 0.2]))
    assert lora_config.r == R
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B = (getattr(layer, f"braidlora_{name}").default.weight for name in "AB")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    expected = sum(w * b for w, b in zip((0.5, 0.3, 0.2), B.split(R, 1), strict=True)) @ sum(A.split(R))
    torch.testing.assert_close(lora[key.format("B")] @ lora[key.format("A")], expected)

    adapter = AdapterFile(folder, "run")
    factors = adapter.read(adapter.layers[0].name)
    assert (len(factors.A), len(factors.B), factors.rank) == (3, 3, R)
    assert adapter.config["share"] == "sum"
    assert compare([adapter])["A"]["elements"] == ["run #1", "run #2", "run #3"]
