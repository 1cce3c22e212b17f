"""The plugin inside vLLM without an engine: its gate around vLLM's kernels, its seams, what it loads and refuses."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_models import folder_of

from braidlora import MultiLoraConfig
from braidlora.serving.adapter_file import Layout

pytest.importorskip("vllm", reason="vLLM has an environment of its own; see docs/serving.md")
pytestmark = pytest.mark.acceptance

from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402

from braidlora.serving.vllm import register, seams  # noqa: E402 (after the skip)

RANK, EXPECTED = 32, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(autouse=True, scope="module")
def plugin():
    register()


def load(folder, max_lora_rank=RANK, expected=EXPECTED):
    """An adapter as vLLM's worker loads it."""
    helper = PEFTHelper.from_local_dir(str(folder), 128)
    helper.validate_legal(SimpleNamespace(max_lora_rank=max_lora_rank))
    return LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )


def test_seams_of_the_installed_version():
    assert seams.problems() == []


def test_registering_twice_changes_nothing():
    before = PEFTHelper.from_local_dir, LoRAModel.from_local_checkpoint, PEFTHelper.validate_legal
    register()
    assert before == (PEFTHelper.from_local_dir, LoRAModel.from_local_checkpoint, PEFTHelper.validate_legal)


@pytest.mark.parametrize("share", ["B", "A", "none"])
def test_the_kernels_with_the_gate(share, tmp_path):
    """A layer with two slices and a batch of three adapters and the base, through vLLM's own CPU kernels."""
    from vllm.lora import model_manager

    config = SimpleNamespace(max_loras=3, max_lora_rank=RANK)
    wrapper = model_manager.get_punica_wrapper(
        64, max_batches=8, device=torch.device("cpu"), lora_config=config
    )
    torch.manual_seed(0)
    settings = MultiLoraConfig(share=share, num_experts=3, r=4, target_modules=["q_proj", "k_proj"])
    routed = load(folder_of(tmp_path, settings))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    layers = [routed.loras[name] for name in names]
    sizes = tuple(layer.lora_b.shape[0] for layer in layers)
    a = tuple(torch.randn(3, 1, RANK, layer.lora_a.shape[1]) for layer in layers)
    b = tuple(torch.randn(3, 1, size, RANK) for size in sizes)
    for slot, layout in enumerate((None, routed.braidlora, Layout(2, 8))):
        wrapper.gate.set_slot(slot, layout)
    for s, layer in enumerate(layers):
        a[s][1, 0], b[s][1, 0] = layer.lora_a, layer.lora_b
    tokens = [0, 11, 12, 12, 13, 0, 12]  # ids of adapters; 0 is the base
    slots = {11: 0, 12: 1, 13: 2}
    mapping = LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=True)
    wrapper.update_metadata(mapping, [11, 12, 13], 3, 64)
    x, y = torch.randn(7, a[0].shape[-1]), torch.randn(7, sum(sizes))
    expected = y.clone().double()
    for t, name in enumerate(tokens):
        for s, start in enumerate((0, sizes[0])):
            if name == 0:
                continue
            hidden = x[t].double() @ a[s][slots[name], 0].double().T
            layout = (None, Layout(3, 4), Layout(2, 8))[slots[name]]
            if layout is not None:
                n, r = layout.num_experts, layout.r
                weights = torch.softmax(hidden[RANK - n :], -1).repeat_interleave(r)
                hidden = torch.cat([hidden[: n * r] * weights, torch.zeros(RANK - n * r).double()])
            expected[t, start : start + sizes[s]] += hidden @ b[s][slots[name], 0].double().T
    wrapper.add_lora_linear(y, x, a, b, 1.0, sizes)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_plain_loras_skips_the_gate(monkeypatch):
    from vllm.lora import model_manager

    config = SimpleNamespace(max_loras=2, max_lora_rank=8)
    wrapper = model_manager.get_punica_wrapper(
        16, max_batches=8, device=torch.device("cpu"), lora_config=config
    )
    wrapper.gate.set_slot(1, Layout(2, 2))
    for tokens, needed in (((5, 5), False), ((5, 6), True), ((6,), True), ((5, 0), True)):
        wrapper.update_metadata(LoRAMapping(tokens, tokens, is_prefill=True), [5, 6], 2, 64)
        assert wrapper.is_needed is needed


def test_a_loaded_adapter_fills_the_rank_of_the_server(tmp_path):
    model = load(folder_of(tmp_path, MultiLoraConfig(num_experts=3, r=4, target_modules="all-linear")))
    assert model.braidlora == Layout(3, 4)
    layer = model.loras["model.layers.1.mlp.down_proj"]
    assert layer.lora_a.shape[0] == layer.lora_b.shape[1] == model.rank == RANK
    assert layer.scaling == 1


def test_one_expert_is_a_plain_lora(tmp_path):
    folder = folder_of(
        tmp_path, MultiLoraConfig(num_experts=1, r=4, lora_alpha=12, target_modules=["q_proj"])
    )
    model = load(folder)
    layer = model.loras["model.layers.0.self_attn.q_proj"]
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.braidlora_B.weight"
    torch.testing.assert_close(layer.lora_b, stored[name] * 3)
    assert (model.braidlora.num_experts, layer.scaling, model.rank) == (1, 1, 4)


def test_refusals(tmp_path):
    folder = folder_of(tmp_path, MultiLoraConfig(num_experts=3, r=8, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"needs rank 27 .* this server has --max-lora-rank 16. Start it with .* 32"
    ):
        load(folder, max_lora_rank=16)
    with pytest.raises(ValueError, match="adapts q_proj, and vLLM applies LoRA in this model to v_proj"):
        load(folder, expected={"v_proj"})
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    for changed, message in (
        ({"modules_to_save": ["score"]}, "trained modules"),
        ({"bias": "all"}, "trained biases"),
        ({"share": "C"}, "share is 'C'"),
        ({"num_experts": 4}, "expected"),
    ):
        config.write_text(json.dumps(settings | changed))
        with pytest.raises(ValueError, match=message):
            load(folder)
    config.write_text(json.dumps(settings))
    load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="only adapters in safetensors are served"):
        load(folder)


def test_an_unsupported_vllm_keeps_working_for_others_and_refuses_ours(tmp_path):
    """In a process of its own: what the plugin relies on is gone, vLLM starts, and our adapter gets one sentence."""
    routed = folder_of(tmp_path / "routed", MultiLoraConfig(num_experts=2, r=4, target_modules=["q_proj"]))
    program = f"""
import json, sys
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
del LoRAModel.from_lora_tensors
from braidlora.serving.vllm import register
register(); register()
plain = {str(tmp_path / "plain")!r}
import os; os.makedirs(plain)
open(plain + "/adapter_config.json", "w").write(json.dumps(
    {{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}}))
assert PEFTHelper.from_local_dir(plain, 128).r == 4
try:
    PEFTHelper.from_local_dir({str(routed)!r}, 128)
except ValueError as error:
    print("REFUSED", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    refused = next(
        (line for line in done.stdout.splitlines() if line.startswith("REFUSED")), done.stderr[-2000:]
    )
    assert "is not supported by this version of braidlora, which was tested with" in refused
    assert "from_lora_tensors is missing" in refused
    assert refused.count(". ") <= 1


def test_check_finds_the_plugin():
    done = subprocess.run(
        [sys.executable, "-m", "braidlora", "serve", "--check", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["version"] == seams.version()
