"""From the recipe to a PEFT model, and adapters on disk (faults.md 3, 8, 14)."""

import json

import peft
import pytest
import torch
import transformers

from braidlora import MultiLoraConfig
from braidlora.adapters.base_edits import ALLOWED
from braidlora.config import ModelSection
from braidlora.errors import CheckpointError, ConfigError
from braidlora.models.adapter_config import build_adapter_config
from braidlora.models.adapter_reader import open_adapter, restore_adapter
from braidlora.models.adapter_writer import save_adapter
from braidlora.models.attach import attach_adapter
from braidlora.models.base import load_base
from helpers.tiny_base import build_base


@pytest.fixture
def attached(make_config):
    def attach(seed=0, **overrides):
        config = make_config(**overrides)
        base, _ = load_base(config.model)
        return attach_adapter(base, config, seed)

    return attach


@pytest.mark.parametrize(("method", "share"), [("alora", "B"), ("hydralora", "A"), ("moelora", "none")])
def test_the_family_is_a_multi_lora_config(make_config, method, share):
    config = build_adapter_config(
        make_config(
            adapter__method=method, adapter__router_temperature=2.0, adapter__use_rslora=True,
            adapter__rank_pattern={"v_proj": 2}, adapter__alpha_pattern={"v_proj": 3.0},
        )
    )  # fmt: skip
    assert isinstance(config, MultiLoraConfig)
    assert (config.share, config.num_experts, config.r, config.lora_alpha) == (share, 2, 4, 16)
    assert (config.router_temperature, config.use_rslora, config.lora_dropout) == (2.0, True, 0.1)
    assert (config.rank_pattern, config.alpha_pattern) == ({"v_proj": 2}, {"v_proj": 3.0})
    assert config.task_type == "CAUSAL_LM"


def test_lora_is_stock_peft(make_config):
    assert build_adapter_config(make_config(adapter__expert_init="identical")).init_weights == "identical"
    config = build_adapter_config(make_config(adapter__method="lora"))
    assert type(config) is peft.LoraConfig
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 16, {"q_proj", "v_proj"})
    assert build_adapter_config(make_config(kind="classify", adapter__method="lora")).task_type == "SEQ_CLS"


def test_what_lora_ignores_is_told(make_config):
    with pytest.warns(UserWarning, match=r"adapter\.balance_loss is ignored"):
        build_adapter_config(make_config(adapter__method="lora", adapter__balance_loss=0.1))


def test_the_revision_of_a_hub_base_is_saved(make_config, tiny_base, tmp_path):
    config = make_config()
    base, _ = load_base(config.model)
    there = config.model_copy(update={"model": ModelSection(path="owner/name", revision="v2")})
    save_adapter(attach_adapter(base, there, 0), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"


def test_any_peft_type(make_config):
    method = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    config = build_adapter_config(make_config(adapter={"method": method}))
    assert type(config) is peft.IA3Config
    with pytest.raises(ConfigError, match="unknown peft_type 'IA4'; did you mean IA3"):
        build_adapter_config(make_config(adapter={"method": {"peft_type": "IA4"}}))
    with pytest.raises(ConfigError, match=r"not a valid IA3 configuration.*rank"):
        build_adapter_config(make_config(adapter={"method": {"peft_type": "IA3", "rank": 3}}))
    with pytest.raises(ConfigError, match="adapter: r would be ignored"):
        build_adapter_config(make_config(adapter={"method": method, "r": 4}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base's own weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base's own weights"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base's own weights"),
        ({"init_lora_weights": "OLoRA"}, "'OLoRA' changes the base's own weights"),
        ({"init_lora_weights": "corda"}, "'corda' changes the base's own weights"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {}}, "'lora_ga' changes the base's own weights"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq' changes|scipy"),
        ({"kasa_config": {}}, "kasa_config changes the base's own weights"),
        ({"init_lora_weights": "eva"}, "is computed from data by peft.initialize_lora_eva_weights"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_initializations_that_edit_the_base_or_need_data_are_refused(settings, message, make_config):
    method = {"peft_type": "LORA", "target_modules": ["q_proj"], **settings}
    with pytest.raises(ConfigError, match=message) as caught:
        build_adapter_config(make_config(adapter={"method": method}))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("init", ALLOWED)
@pytest.mark.filterwarnings("ignore")
def test_other_initializations_leave_the_base_alone(init, attached, tmp_path):
    method = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    model = attached(adapter={"method": method})
    save_adapter(model, tmp_path)
    restore_adapter(attached(adapter={"method": method}), open_adapter(tmp_path))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_method_of_any_name_that_edits_the_base_is_refused(init, attached, monkeypatch):
    monkeypatch.setattr("braidlora.models.adapter_config.base_edit", lambda settings: None)
    method = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    with pytest.raises(
        ConfigError, match=r"LORA with these settings changes the base's own weights \(model.layers.0"
    ):
        attached(adapter={"method": method})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"'q_prj' matches no module of this llama model\. Nearest: q_proj"),
        (["q_proj", "query"], "'query' matches no module"),
        ([r".*\.q_proj"], "matches no module"),
        (["input_layernorm"], "matches model.layers.0.input_layernorm, a LlamaRMSNorm; only linear layers"),
        (r".*\.mlp", "matches model.layers.0.mlp, a LlamaMLP"),
        (["lm_head"], "matches lm_head, the output layer; only linear layers"),
        ("q_proj", r"A string is a regular expression over full names; for a name write \[q_proj\]"),
        ("(q_proj", "not a valid regular expression"),
    ],
)
def test_targets_that_do_not_fit(attached, targets, message):
    with pytest.raises(ConfigError, match=message) as caught:
        attached(adapter__target_modules=targets)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(None, 4), ("all-linear", 14), (r".*\.(q|k|v)_proj", 6), (["layers.0.mlp.up_proj"], 1)],
)
def test_targets_that_fit(attached, targets, layers):
    model = attached(adapter__target_modules=targets)
    assert sum(name.endswith("braidlora_A.default") for name, _ in model.named_modules()) == layers


def test_no_default_targets_for_an_unknown_architecture(attached, monkeypatch):
    name = "braidlora.models.adapter_targets.DEFAULTS"
    monkeypatch.setattr(name, {})
    with pytest.raises(
        ConfigError, match=r"required, because PEFT has no default for llama models\. Its linear layers"
    ):
        attached(adapter__target_modules=None)


def test_modules_to_save_must_exist(attached):
    with pytest.raises(ConfigError, match=r"'embed_token' matches no module.*nearest: embed_tokens"):
        attached(adapter__modules_to_save=["embed_token"])


def test_virtual_tokens_and_packing_exclude_each_other(attached):
    method = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    with pytest.raises(ConfigError, match=r"prompt\.packing: PROMPT_TUNING puts virtual tokens"):
        attached(adapter={"method": method}, prompt__packing=True)


def test_initial_weights_depend_on_the_seed_alone(attached):
    def weights(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(11)
    first = weights(attached(seed=5))
    after = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(3))  # the global generator went on as if nothing had been drawn
    torch.manual_seed(99)
    again, other = weights(attached(seed=5)), weights(attached(seed=6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_classifiers_new_modules_are_trained_and_saved(make_config, tmp_path):
    from transformers import DistilBertConfig, DistilBertModel

    from braidlora.tasks import LabelSpace

    folder = build_base(tmp_path / "base")
    DistilBertModel(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    ).save_pretrained(folder)
    config = make_config(kind="classify", adapter__target_modules=["q_lin"])
    base, _ = load_base(ModelSection(path=str(folder)), LabelSpace({"up": ["no", "yes"]}))
    model = attach_adapter(base, config, 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("pre_classifier" in name for name in trained)
    save_adapter(model, tmp_path / "adapter")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.pre_classifier.weight", "base_model.model.classifier.weight"} <= set(saved)


def test_saved_sets_are_sorted(attached, tmp_path):
    targets = ["v_proj", "k_proj", "q_proj", "o_proj", "up_proj", "down_proj"]
    save_adapter(attached(adapter__target_modules=targets), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(targets)


def test_whoever_may_read_the_configuration_may_read_the_weights(attached, tmp_path):
    save_adapter(attached(), tmp_path)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]


def test_the_card_says_import_first(attached, tmp_path):
    save_adapter(attached(), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.index("import braidlora") < card.index("from peft import PeftModel")
    assert "ALoRA (shared B), 2 experts, rank 4" in card
    save_adapter(attached(adapter__method="lora"), tmp_path / "lora")
    assert "import braidlora" not in (tmp_path / "lora" / "README.md").read_text()


def test_load_gives_the_saved_weights(attached, tmp_path):
    model = attached(seed=1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    save_adapter(model, tmp_path)
    other = attached(seed=2)
    restore_adapter(other, open_adapter(tmp_path))
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter__r": 8}, "r: 4 in the checkpoint, 8 here"),
        ({"adapter__num_experts": 3}, "num_experts: 2 in the checkpoint, 3 here"),
        ({"adapter__method": "hydralora"}, "share: 'B' in the checkpoint, 'A' here"),
        ({"adapter__method": "lora"}, "peft_type: 'BRAIDLORA' in the checkpoint, 'LORA' here"),
        (
            {"adapter__target_modules": ["q_proj"]},
            r"target_modules: \['q_proj', 'v_proj'\] in the checkpoint",
        ),
    ],
)
def test_another_configuration_is_refused(attached, tmp_path, change, message):
    save_adapter(attached(), tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        restore_adapter(attached(**change), open_adapter(tmp_path))
    assert caught.value.exit_code == 5


def test_missing_extra_and_misshapen_keys_are_listed(attached, tmp_path):
    from safetensors.torch import load_file, save_file

    save_adapter(attached(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    names = sorted(state)
    del state[names[0]]
    state["base_model.model.somewhere.braidlora_A.weight"] = torch.zeros(2)
    state[names[1]] = torch.zeros(3, 3)
    save_file(state, path)
    with pytest.raises(CheckpointError) as caught:
        restore_adapter(attached(), open_adapter(tmp_path))
    text = str(caught.value)
    assert f"1 missing: {names[0]}" in text
    assert "1 unexpected: base_model.model.somewhere.braidlora_A.weight" in text
    assert f"1 with a different shape: {names[1]} is (3, 3), expected (" in text


def test_a_pickled_adapter_is_refused(attached, tmp_path):
    model = attached()
    save_adapter(model, tmp_path)
    torch.save(peft.get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has its weights as a pickle"):
        restore_adapter(attached(), open_adapter(tmp_path))


def test_damaged_weights_are_refused(attached, tmp_path):
    save_adapter(attached(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        restore_adapter(attached(), open_adapter(tmp_path))


@pytest.fixture
def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("method", "targets", "modules"),
    [
        ("alora", ["q_proj"], 1),
        ("alora", None, 2),
        ("moelora", [], 0),
        ("lora", [], 0),
        ("lora", ["q_proj"], 1),
    ],
)
def test_experts_by_target_parameters(make_config, mixtral, method, targets, modules):
    """`target_modules: []` adapts experts alone, null the usual layers beside them."""
    config = make_config(
        adapter__method=method, adapter__target_modules=targets, adapter__target_parameters=EXPERTS,
        adapter__lora_dropout=0.0,
    )  # fmt: skip
    model = attach_adapter(mixtral, config, seed=0)
    assert len(model.base_model.targeted_module_names) == modules
    assert len(model.base_model.targeted_parameter_names) == 2


def test_dropout_on_experts_is_refused_for_lora_with_the_remedy(make_config, mixtral):
    config = make_config(
        adapter__method="lora", adapter__target_parameters=EXPERTS, adapter__lora_dropout=0.1
    )
    with pytest.raises(ConfigError, match=r"set adapter\.lora_dropout=0"):
        attach_adapter(mixtral, config, seed=0)


@pytest.mark.parametrize(
    ("target", "said"),
    [("gate_up_proj", "matches no module"), ("experts", "a MixtralExperts; only linear layers")],
)
def test_experts_among_the_modules_are_sent_to_the_parameters(make_config, mixtral, target, said):
    remedy = r"Experts go in adapter\.target_parameters: \[experts\.gate_up_proj, experts\.down_proj\]"
    with pytest.raises(ConfigError, match=f"{said}.*{remedy}"):
        attach_adapter(mixtral, make_config(adapter__target_modules=[target]), seed=0)
