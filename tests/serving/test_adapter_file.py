"""What a server reads of an adapter folder, without torch and PEFT, against PEFT and the package's own layers."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from small_models import folder_of, small_model

from braidlora import FactoredLoraConfig, MultiLoraConfig
from braidlora.errors import CheckpointError, ConfigError
from braidlora.serving import adapter_file
from braidlora.serving.adapter_file import AdapterFile, Layout, layout_of, read_adapter_file, read_shapes


def shapes_of(folder, config):
    return read_shapes(folder, config.peft_type)


@pytest.mark.parametrize("share", ["B", "A", "none"])
def test_layout_of_a_saved_adapter(share, tmp_path):
    folder = folder_of(tmp_path, MultiLoraConfig(share=share, num_experts=3, r=4, target_modules=["q_proj"]))
    config = read_adapter_file(folder)
    assert (config.share, config.routed) == (share, True)
    layout = layout_of(config, shapes_of(folder, config), folder)
    assert layout == Layout(3, 4)
    assert layout.columns == 3 * 4 + 3


def test_layout_takes_the_largest_rank(tmp_path):
    settings = MultiLoraConfig(
        num_experts=2, r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 6}
    )
    folder = folder_of(tmp_path, settings)
    config = read_adapter_file(folder)
    assert layout_of(config, shapes_of(folder, config), folder) == Layout(2, 6)


def test_layouts_without_a_router(tmp_path):
    single = folder_of(tmp_path / "1", MultiLoraConfig(num_experts=1, r=4, target_modules=["q_proj"]))
    factored = folder_of(tmp_path / "f", FactoredLoraConfig(r=4, r_intermediate=6, target_modules=["q_proj"]))
    for folder, rank in ((single, 4), (factored, 6)):
        config = read_adapter_file(folder)
        layout = layout_of(config, shapes_of(folder, config), folder)
        assert layout == Layout(1, rank)
        assert layout.columns == rank
        assert not config.routed
        assert config.ours


def test_equal_weights_are_a_plain_lora(tmp_path):
    for share, rank in (("A", 4), ("B", 4), ("none", 12)):
        settings = MultiLoraConfig(share=share, num_experts=3, r=4, gate="uniform", target_modules=["q_proj"])
        folder = folder_of(tmp_path / share, settings)
        config = read_adapter_file(folder)
        assert layout_of(config, shapes_of(folder, config), folder) == Layout(1, rank)


def test_patterns_and_scaling_follow_peft():
    names = [
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    patterns = [
        {"q_proj": 2},
        {"1.self_attn.q_proj": 2, "q_proj": 3},
        {r"layers\.\d+\.mlp.*": 7},
        {"proj": 5},
        {},
    ]
    for pattern in patterns:
        file = AdapterFile(peft_type="BRAIDLORA", r=4, lora_alpha=10, alpha_pattern=pattern)
        for name in names:
            assert file.scaling_of(name) * 4 == pattern.get(get_pattern_key(pattern, name), 10)
    ranked = AdapterFile(
        peft_type="BRAIDLORA", r=4, lora_alpha=10, rank_pattern={"q_proj": 16}, use_rslora=True
    )
    assert ranked.scaling_of(names[0]) == 10 / 4.0
    assert ranked.scaling_of(names[2]) == 10 / 2.0


def test_scaling_is_that_of_the_layers(tmp_path):
    config = MultiLoraConfig(
        r=4,
        target_modules="all-linear",
        use_rslora=True,
        rank_pattern={"k_proj": 2},
        alpha_pattern={"up_proj": 3},
    )
    model = get_peft_model(small_model(), config)
    model.save_pretrained(tmp_path)
    file = read_adapter_file(tmp_path)
    checked = 0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            assert file.scaling_of(name) == pytest.approx(module.scaling["default"], rel=1e-12)
            checked += 1
    assert checked > 7


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["score"]}, "trained modules (modules_to_save: score)"),
        ({"bias": "all"}, "trained biases"),
        ({"target_parameters": ["experts.down_proj"]}, "stacked experts"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"gate": "task", "num_experts": 3}, "a different LoRA for each of its tasks"),
        ({"task_map": True}, "a different LoRA for each of its tasks"),
        ({"gate": "of another version", "num_experts": 3}, "a different LoRA for each of its tasks"),
    ],
)
def test_refusals_name_what_cannot_be_served(settings, reason):
    assert adapter_file.refusals(AdapterFile(peft_type="BRAIDLORA")) == []
    (found,) = adapter_file.refusals(AdapterFile(peft_type="BRAIDLORA", **settings))
    assert reason in found


def test_all_variants_of_pefts_lora_are_refused():
    variants = {
        field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")
    }
    others = {"lora_bias", "layer_replication", "use_qalora"}  # in vLLM's own list
    for name in (variants | others) - {"kasa_config"}:  # which edits the base
        (found,) = adapter_file.refusals(AdapterFile(peft_type="LORA", **{name: {"a": 1}}))
        assert found == f"it is a variant of LoRA ({name}) that vLLM does not load"


def test_heads_are_refused():
    assert adapter_file.head_refusal({"model.layers.0.self_attn.q_proj": 1}) is None
    assert "lm_head" in adapter_file.head_refusal({"model.layers.0.self_attn.q_proj": 1, "lm_head": 1})


def test_smallest_allowed_rank():
    assert [adapter_file.smallest_allowed_rank(n, "x") for n in (1, 2, 27, 33, 257, 512)] == [
        1,
        8,
        32,
        64,
        320,
        512,
    ]
    with pytest.raises(ConfigError, match=r"needs rank 513.*at most 512.*braidlora export"):
        adapter_file.smallest_allowed_rank(513, "x")


def test_other_types_are_not_read_as_a_lora(tmp_path):
    for content in (
        {"peft_type": "OFT", "r": 0},
        {"peft_type": "SUPERTUNING", "r": None, "lora_alpha": None},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        assert read_adapter_file(tmp_path).peft_type == content["peft_type"]


def test_damaged_configurations(tmp_path):
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        read_adapter_file(tmp_path)
    for content, message in [
        ("{", "not valid JSON"),
        ("[]", "not valid"),
        ("{}", "peft_type"),
        ('{"peft_type": "BRAIDLORA", "share": "C"}', "share is 'C'"),
        ('{"peft_type": "BRAIDLORA", "num_experts": 0}', "num_experts"),
        ('{"peft_type": "BRAIDLORA", "lora_alpha": NaN}', "lora_alpha"),
    ]:
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_adapter_file(tmp_path)


def test_damaged_weights(tmp_path):
    folder = folder_of(tmp_path, MultiLoraConfig(num_experts=2, r=4, target_modules=["q_proj"]))
    weights = folder / "adapter_model.safetensors"
    config = read_adapter_file(folder)
    whole = weights.read_bytes()
    for content in (b"", whole[:20], b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            shapes_of(folder, config)
    weights.unlink()
    with pytest.raises(CheckpointError, match="only adapters in safetensors"):
        shapes_of(folder, config)


def test_wrong_tensors(tmp_path):
    config = AdapterFile(peft_type="BRAIDLORA", num_experts=2, r=2)
    good = {
        "base_model.model.q_proj.braidlora_A.weight": torch.zeros(4, 8),
        "base_model.model.q_proj.braidlora_router.weight": torch.zeros(2, 8),
        "base_model.model.q_proj.braidlora_B.weight": torch.zeros(6, 2),
    }

    def layout(tensors):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return layout_of(config, read_shapes(tmp_path, "BRAIDLORA"), tmp_path)

    assert layout(good) == Layout(2, 2)
    with pytest.raises(CheckpointError, match="expected braidlora_A, braidlora_B, braidlora_router"):
        layout({name: value for name, value in good.items() if "router" not in name})
    with pytest.raises(CheckpointError, match=r"braidlora_router is \(3, 8\), expected \(2, 8\)"):
        layout(good | {"base_model.model.q_proj.braidlora_router.weight": torch.zeros(3, 8)})
    with pytest.raises(CheckpointError, match=r"unexpected tensor base_model\.model\.score\.weight"):
        layout(good | {"base_model.model.score.weight": torch.zeros(3, 8)})


def test_the_configuration_file_is_read_as_peft_writes_it(tmp_path):
    config = MultiLoraConfig(share="A", num_experts=4, r=8, lora_alpha=20, router_temperature=0.5)
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_experts"] == 4
    read = read_adapter_file(tmp_path)
    assert (read.num_experts, read.r, read.lora_alpha, read.router_temperature) == (4, 8, 20, 0.5)
