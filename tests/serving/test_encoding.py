"""The server's form of an adapter, against a loop over experts in float64 and against the package's own layers."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from small_models import folder_of, random_adapter

from braidlora import FactoredLoraConfig, MultiLoraConfig
from braidlora.errors import CheckpointError
from braidlora.serving import encoding
from braidlora.serving.adapter_file import AdapterFile, Layout, read_adapter_file
from braidlora.serving.gate import GateTables

RANK = 64
ADAPTERS = {
    "alora": MultiLoraConfig(share="B", num_experts=3, r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "hydralora": MultiLoraConfig(share="A", num_experts=5, r=4, target_modules="all-linear"),
    "moelora": MultiLoraConfig(
        share="none", num_experts=4, r=3, target_modules="all-linear", use_rslora=True, router_temperature=0.6
    ),
    "patterns": MultiLoraConfig(
        share="none", num_experts=3, r=4, target_modules="all-linear",
        rank_pattern={"q_proj": 8, "down_proj": 1}, alpha_pattern={"v_proj": 5, "layers.1.self_attn.o_proj": 31},
    ),
    "shared A, patterns": MultiLoraConfig(
        share="A", num_experts=2, r=4, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 7}
    ),
    "shared B, patterns": MultiLoraConfig(
        share="B", num_experts=6, r=2, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 5}
    ),
    "two experts of rank 1": MultiLoraConfig(num_experts=2, r=1, target_modules=["k_proj"]),
    "uniform": MultiLoraConfig(share="B", num_experts=3, r=4, gate="uniform", target_modules=["q_proj", "o_proj"]),
    "uniform stack": MultiLoraConfig(share="none", num_experts=3, r=4, gate="uniform", target_modules=["q_proj"]),
    "one expert": MultiLoraConfig(num_experts=1, r=4, target_modules="all-linear", alpha_pattern={"k_proj": 3}),
    "factored": FactoredLoraConfig(r=4, r_intermediate=6, target_modules=["q_proj", "up_proj"], use_rslora=True),
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
}  # fmt: skip


def encoded(folder):
    """Configuration, layout, and encoded state dict of an adapter folder."""
    config = read_adapter_file(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    modules = encoding.group(stored.items(), config.peft_type, folder)
    layout = encoding.layout(config, modules, folder)
    return config, layout, encoding.encode(config, modules, layout, RANK)


def served(x, shrink, expand, layout):
    """What a server computes: shrink, gate, expand."""
    tables = GateTables(
        slots=2, rank=shrink.shape[0] if layout.num_experts == 1 else RANK, tokens=64, device="cpu"
    )
    tables.set_slot(1, layout)
    tables.set_batch(torch.ones(x.shape[0], dtype=torch.long))
    return tables.apply((x @ shrink.T)[None])[0] @ expand.T


def by_expert(x, config, layout, tensors, module):
    """s Σᵢ wᵢ Bᵢ Aᵢ x in float64, one expert after the other."""
    x, n = x.double(), config.num_experts
    if config.peft_type == "LORA":
        return config.scaling_of(module) * x @ tensors["lora_A"].T.double() @ tensors["lora_B"].T.double()
    A, B = tensors["braidlora_A"].double(), tensors["braidlora_B"].double()
    r = B.shape[1] if config.share == "B" else A.shape[0] // (1 if config.share == "A" else n)
    weights = torch.full((x.shape[0], config.num_experts), 1 / config.num_experts).double()
    if config.routed:
        weights = torch.softmax(x @ tensors["braidlora_router"].T.double() / config.router_temperature, -1)
    total = 0.0
    for i in range(n):
        A_i = A if config.share == "A" else A[i * r : (i + 1) * r]
        B_i = B if config.share == "B" else B[:, i * r : (i + 1) * r]
        total = total + weights[:, i : i + 1] * (x @ A_i.T @ B_i.T)
    return config.scaling_of(module) * total


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "factored"])
def test_against_a_loop_over_experts(name, tmp_path):
    folder = folder_of(tmp_path, ADAPTERS[name])
    config, layout, state = encoded(folder)
    modules = encoding.group(
        load_file(folder / "adapter_model.safetensors").items(), config.peft_type, folder
    )
    for module, tensors in modules.items():
        shrink = state[f"base_model.model.{module}.lora_A.weight"]
        expand = state[f"base_model.model.{module}.lora_B.weight"]
        x = torch.randn(7, shrink.shape[1])
        expected = by_expert(x, config, layout, tensors, module)
        if layout.num_experts > 1:
            assert shrink.shape[0] == expand.shape[1] == RANK
            actual = served(x, shrink, expand, layout)
        else:
            actual = x @ shrink.T @ expand.T
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_against_the_layers(name, tmp_path):
    model = random_adapter(ADAPTERS[name])
    model.save_pretrained(tmp_path)
    _, layout, state = encoded(tmp_path)
    layers = {key.removeprefix("base_model.model."): module for key, module in model.named_modules()}
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in state}
    assert names == {key for key, module in layers.items() if hasattr(module, "base_layer")}
    for module in names:
        shrink = state[f"base_model.model.{module}.lora_A.weight"]
        expand = state[f"base_model.model.{module}.lora_B.weight"]
        x = torch.randn(5, shrink.shape[1])
        with torch.no_grad():
            expected = layers[module](x) - layers[module].base_layer(x)
        actual = served(x, shrink, expand, layout) if layout.num_experts > 1 else x @ shrink.T @ expand.T
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_router_is_in_the_last_rows_and_unused_columns_are_zero(tmp_path):
    folder = folder_of(tmp_path, ADAPTERS["alora"])
    config, layout, state = encoded(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    router = stored["base_model.model.model.layers.0.self_attn.q_proj.braidlora_router.weight"]
    shrink = state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    expand = state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    torch.testing.assert_close(shrink[-3:], router / config.router_temperature)
    assert not shrink[24:-3].any()
    assert not expand[:, 24:].any()
    assert torch.equal(expand[:, :8], expand[:, 8:16])  # the shared B, repeated
    assert layout == Layout(3, 8)


def test_weights_of_16_bits_are_scaled_in_float32():
    A, W, B = (torch.randn(shape).bfloat16() for shape in ((4, 8), (2, 8), (6, 2)))
    shrink, expand = encoding.encode_module(
        A, W, B, share="B", temperature=3.0, scaling=1 / 3, where=Layout(2, 2), rank=8
    )
    assert shrink.dtype == expand.dtype == torch.float32
    assert torch.equal(expand[:, :2], B.float() * (1 / 3))
    assert torch.equal(shrink[-2:], W.float() / 3.0)


def test_infinite_weights_are_rejected():
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.tensor([[1.0, float("inf")]])}
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight contains NaN or infinity"):
        encoding.group(tensors.items(), "LORA", Path("adapter"))


def test_state_dict_has_every_adapted_module(tmp_path):
    model = random_adapter(ADAPTERS["hydralora"])
    model.save_pretrained(tmp_path)
    config, _, state = encoded(tmp_path)
    assert isinstance(config, AdapterFile)
    assert len(state) == 2 * len(get_peft_model_state_dict(model)) // 3
