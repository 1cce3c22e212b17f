"""`LoraConfig` swapped by its name: its spellings mean the same here, or are refused by name."""

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftConfig, get_peft_model
from tiny import CONFIGS, PREFIXES, adapted, config, llama
from transformers import GPT2Config, GPT2LMHeadModel

from braidlora import FactoredLoraConfig, MultiLoraConfig
from braidlora.errors import ConfigError

BOTH = pytest.mark.parametrize("tuner", CONFIGS)


@BOTH
@pytest.mark.parametrize("value", [True, False])
def test_init_lora_weights(tuner, value):
    assert CONFIGS[tuner](init_lora_weights=value).init_weights is value
    assert CONFIGS[tuner](init_lora_weights=value, init_weights=value).init_weights is value
    with pytest.raises(ConfigError, match="contradict each other"):
        CONFIGS[tuner](init_lora_weights=value, init_weights=not value)


@pytest.mark.parametrize("share", ["B", "A", "none"])
def test_gaussian_draws_every_a_as_lora_does(share):
    config = MultiLoraConfig(
        share=share, r=16, init_lora_weights="gaussian", target_modules=["down_proj"], lora_dropout=0.0
    )
    layer = (
        get_peft_model(llama(intermediate_size=4096), config).base_model.model.model.layers[0].mlp.down_proj
    )
    A = layer.braidlora_A["default"].weight
    assert A.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert A.abs().max() > 2.5 / 16, "a uniform draw has no tails"
    assert not layer.braidlora_B["default"].weight.any()
    bound = 1 / 4096**0.5  # Kaiming-uniform with a = √5: the router is drawn as ever
    assert layer.braidlora_router["default"].weight.abs().max() <= bound


def test_gaussian_of_a_factored_lora_is_refused():
    with pytest.raises(ConfigError, match="init_weights is 'gaussian'; it must be True or False"):
        FactoredLoraConfig(init_lora_weights="gaussian")


@BOTH
@pytest.mark.parametrize(
    "value", ["pissa", "pissa_niter_4", "olora", "eva", "loftq", "corda", "orthogonal", "mica", "kaiming", 3]
)
def test_other_initializations_are_refused(tuner, value):
    with pytest.raises(ConfigError, match=r"init_(lora_)?weights is .*True"):
        CONFIGS[tuner](init_lora_weights=value)


@BOTH
def test_bias_lora_only_is_that_of_adapted_layers(tuner):
    made = config(tuner, bias="lora_only")
    assert made.bias == PREFIXES[tuner] + "only"
    base = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    model = get_peft_model(base, config(tuner, bias="lora_only", target_modules=["c_attn"]))
    biases = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    assert biases == {"base_model.model.transformer.h.0.attn.c_attn.base_layer.bias"}


@BOTH
@pytest.mark.parametrize(
    ("given", "conv", "warns"), [(True, True, False), (False, True, True), (True, False, True)]
)
def test_fan_in_fan_out_is_read_off_the_layer(tuner, given, conv, warns, recwarn):
    base = (
        GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
        if conv
        else llama(num_hidden_layers=1)
    )
    target = "c_attn" if conv else "q_proj"
    before = get_peft_model(copy.deepcopy(base), config(tuner, target_modules=[target]))
    recwarn.clear()
    torch.manual_seed(0)
    model = get_peft_model(base, config(tuner, target_modules=[target], fan_in_fan_out=given))
    said = [str(w.message) for w in recwarn if "fan_in_fan_out" in str(w.message)]
    assert len(said) == int(warns)
    if warns:
        assert f"fan_in_fan_out is set to {given}" in said[0]
        assert target in said[0]
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in before.named_parameters()
    }


@BOTH
def test_numbers_of_numpy_and_whole_floats(tuner, tmp_path):
    second = {"multi": "num_experts", "factored": "r_intermediate"}[tuner]
    made = CONFIGS[tuner](
        r=np.int64(4), lora_alpha=np.float32(8), lora_dropout=np.float64(0.25), target_modules=("q_proj",),
        rank_pattern={"q_proj": 2.0}, alpha_pattern={"q_proj": np.float64(3)},
        layers_to_transform=np.arange(2), layers_pattern="layers", **{second: 6.0},
    )  # fmt: skip
    values = (made.r, getattr(made, second), made.lora_alpha, made.lora_dropout, made.rank_pattern["q_proj"])
    assert values == (4, 6, 8.0, 0.25, 2)
    assert [type(value) for value in values] == [int, int, float, float, int]
    assert made.layers_to_transform == [0, 1]
    made.save_pretrained(tmp_path)  # JSON knows no numpy
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == made.to_dict()


@BOTH
@pytest.mark.parametrize("value", [8.5, True, np.True_, "8", None, float("nan"), float("inf"), [8]])
def test_what_is_no_whole_number_is_refused(tuner, value):
    second = {"multi": "num_experts", "factored": "r_intermediate"}[tuner]
    for field in ("r", second):
        with pytest.raises(ConfigError, match=f"{field} is .*integer of at least 1"):
            CONFIGS[tuner](**{field: value})
    with pytest.raises(ConfigError, match=r"rank_pattern\['q'\] is"):
        CONFIGS[tuner](rank_pattern={"q": value})


@BOTH
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "bias='lora_only'"),
        ("layer_replication", [(0, 2)], "replicated model"),
        ("megatron_config", {"tensor": 2}, "Megatron"),
        ("loftq_config", {"loftq_bits": 4}, "quantized"),
        ("eva_config", EvaConfig(), "EVA"),
        ("alora_invocation_tokens", [3, 4], "a different method"),
        ("use_qalora", True, "leave it out"),
    ],
)
def test_options_without_a_meaning_here_are_named(tuner, field, value, said):
    with pytest.raises(ConfigError) as error:
        CONFIGS[tuner](**{field: value})
    assert field in str(error.value)
    assert said in str(error.value)
    assert "peft.LoraConfig" in str(error.value)
    assert error.value.exit_code == 2


@BOTH
def test_all_problems_of_spelling_at_once(tuner):
    with pytest.raises(ConfigError, match=r"init_lora_weights is 'pissa'.*use_dora.*lora_bias"):
        CONFIGS[tuner](init_lora_weights="pissa", use_dora=True, lora_bias=True)


@BOTH
def test_every_field_of_a_default_lora_config_is_taken(tuner):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="lora_only")
    fields = lora.to_dict()
    made = CONFIGS[tuner](**fields)
    assert (made.r, made.lora_alpha, made.task_type) == (4, 8, "CAUSAL_LM")
    assert made.bias == PREFIXES[tuner] + "only"
    assert made.peft_type == {"multi": "BRAIDLORA", "factored": "FACTOREDLORA"}[tuner]


@BOTH
def test_a_name_that_nobody_knows(tuner, tmp_path):
    """A typing error is an error; in a file of a later version PEFT drops it with a warning, as it does for LoRA."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnak'"):
        CONFIGS[tuner](rnak=4)
    CONFIGS[tuner](r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    with pytest.warns(UserWarning, match="of_a_later_version"):
        assert PeftConfig.from_pretrained(tmp_path).r == 4


@BOTH
def test_copies_of_a_configuration(tuner):
    made = config(tuner, fan_in_fan_out=True, bias="lora_only")
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), replace(made)):
        assert other.to_dict() == made.to_dict()
    assert replace(made, r=7).r == 7


@BOTH
def test_scale_of_a_swapped_configuration(tuner):
    model = adapted(tuner, use_rslora=True, lora_alpha=np.float64(6), r=np.int32(9))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2.0


@pytest.mark.parametrize("share", ["B", "none"])
def test_identical_experts_start_from_one_a(share):
    config = MultiLoraConfig(share=share, r=4, init_weights="identical", target_modules=["down_proj"])
    layer = get_peft_model(llama(), config).base_model.model.model.layers[0].mlp.down_proj
    A = layer.braidlora_A["default"].weight.unflatten(0, (3, 4))
    assert torch.equal(A[0], A[1])
    assert torch.equal(A[0], A[2])
    assert not torch.equal(A[0, 0], A[0, 1])
