"""An adapter that is made anew, or deleted, leaves nothing behind: nothing trains, and nothing is saved, of the old."""

import copy

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from tiny import CONFIGS, IDS, PREFIXES, adapted, config, layers, llama, logits, trainable
from torch import nn
from transformers import LlamaForSequenceClassification

from braidlora import MultiLoraConfig
from braidlora.errors import ConfigError

BOTH = pytest.mark.parametrize("tuner", CONFIGS)
AGAIN = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute",
    "ignore:Adapter .* was active which is now deleted",
)
CHANGES = {
    "multi": [
        {"num_experts": 1},
        {"share": "A", "r": 2},
        {"share": "none", "num_experts": 2, "lora_dropout": 0.5, "use_rslora": True},
        {"target_modules": ["v_proj", "up_proj"]},
    ],
    "factored": [
        {"r": 2, "r_intermediate": 5},
        {"lora_dropout": 0.5, "use_rslora": True},
        {"target_modules": ["v_proj", "up_proj"]},
    ],
}
CASES = [(tuner, change) for tuner, changes in CHANGES.items() for change in changes]


def parts(layer):
    """Every attribute of a layer that is kept by adapter name."""
    names = (*layer.adapter_layer_names, *layer.other_param_names)
    kept = {name: set(getattr(layer, name)) for name in names}
    by_name = {
        name
        for name, value in (vars(layer) | layer._modules).items()
        if isinstance(value, (dict, nn.ModuleDict, nn.ParameterDict)) and "default" in value
    }
    assert by_name <= set(names), "PEFT deletes what these two lists name, and nothing else"
    return kept


@AGAIN
@pytest.mark.parametrize(("tuner", "change"), CASES, ids=str)
def test_wrapped_again(tuner, change):
    model = adapted(tuner)
    for layer in layers(model):
        layer.lora_dropout["default"] = 0.9  # of the old one
    again = get_peft_model(model.base_model.model, config(tuner, **change)).double()
    fresh = adapted(tuner, **change)
    assert trainable(again) == trainable(fresh)
    assert set(get_peft_model_state_dict(again)) == set(get_peft_model_state_dict(fresh))
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(fresh).items()}
    assert {name: tensor.shape for name, tensor in get_peft_model_state_dict(again).items()} == shapes
    again.load_state_dict(fresh.state_dict(), strict=False)
    assert torch.equal(logits(again.eval()), logits(fresh))
    of_fresh = {name: module for name, module in fresh.named_modules() if module in layers(fresh)}
    for name, module in again.named_modules():
        if name in of_fresh:
            assert parts(module) == parts(of_fresh[name])
            assert (module.scaling, module.lora_dropout) == (
                of_fresh[name].scaling,
                of_fresh[name].lora_dropout,
            )
        elif module in layers(again):
            assert not any(parts(module).values()), "no longer a target"


@AGAIN
def test_no_router_trains_after_one_expert_took_the_place_of_three():
    model = get_peft_model(adapted("multi").base_model.model, config("multi", num_experts=1))
    assert not any("router" in name for name, _ in model.named_parameters())
    assert not any("router" in name for name in get_peft_model_state_dict(model))
    model.merge_adapter()


@AGAIN
@BOTH
def test_heads_and_tokens_of_the_old_adapter_go_too(tuner):
    base = llama(LlamaForSequenceClassification, num_labels=3)
    old = {"modules_to_save": ["score"], "trainable_token_indices": [3, 5]}
    model = get_peft_model(copy.deepcopy(base), config(tuner, **old))
    nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    again = get_peft_model(model.base_model.model, config(tuner))
    assert set(get_peft_model_state_dict(again)) == set(
        get_peft_model_state_dict(get_peft_model(copy.deepcopy(base), config(tuner)))
    )
    assert all(PREFIXES[tuner] in name for name in trainable(again))
    with again.disable_adapter():
        assert torch.equal(logits(again.eval()), logits(base.eval()))


@AGAIN
@BOTH
def test_other_adapters_stay(tuner):
    model = adapted(tuner)
    model.add_adapter("other", config(tuner, r=2))
    expected = {n: p.clone() for n, p in model.named_parameters() if ".other." in n}
    again = get_peft_model(model.base_model.model, config(tuner, target_modules=["up_proj"]))
    kept = dict(again.named_parameters())
    assert expected
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


@AGAIN
@BOTH
def test_a_merged_adapter_is_not_made_anew(tuner):
    model = adapted(tuner, **({"num_experts": 1} if tuner == "multi" else {}))
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"'default' that is merged .* unmerge_adapter"):
        get_peft_model(model.base_model.model, config(tuner))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)


@AGAIN
@BOTH
def test_targets_that_do_not_fit_leave_the_old_adapter(tuner):
    model = adapted(tuner)
    expected = logits(model)
    with pytest.raises(ConfigError, match="qproj"):
        get_peft_model(model.base_model.model, config(tuner, target_modules=["qproj"]))
    assert torch.equal(logits(model), expected)


@AGAIN
@BOTH
def test_deleting_an_adapter_removes_all_of_it(tuner):
    model = adapted(tuner)
    fresh = {name for name, _ in model.named_parameters()}
    model.add_adapter("gone", config(tuner, target_modules=["v_proj", "up_proj"], use_rslora=True))
    model.set_adapter("gone")
    model.delete_adapter("gone")
    assert {name for name, _ in model.named_parameters() if ".base_layer." not in name} == {
        name for name in fresh if ".base_layer." not in name and "up_proj" not in name
    }
    assert not any("gone" in names for layer in layers(model) for names in parts(layer).values())
    assert model.active_adapters == ["default"]
    model.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_a_layer_updated_directly():
    layer = layers(adapted("multi"))[0]
    layer.update_layer("default", MultiLoraConfig(num_experts=1, target_modules=["q_proj"]), 2, 4.0)
    assert "default" not in layer.braidlora_router
    assert (layer.r["default"], layer.scaling["default"], layer.gate["default"].num_experts) == (2, 2.0, 1)
