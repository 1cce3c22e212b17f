"""Merging over a whole model: all layers, or none."""

import pytest
import torch
from peft import PeftModel
from tiny import CONFIGS, adapted, layers, llama, logits
from torch import nn

from braidlora import MultiLoraConfig
from braidlora.errors import MergeError

BOTH = pytest.mark.parametrize("tuner", CONFIGS)


def one_expert(tuner):
    return {"num_experts": 1} if tuner == "multi" else {}


def base_weights(model):
    return [layer.base_layer.weight.clone() for layer in layers(model)]


def unchanged(model, weights, expected):
    assert all(
        torch.equal(a, layer.base_layer.weight) for a, layer in zip(weights, layers(model), strict=True)
    )
    assert not any(layer.merged_adapters for layer in layers(model))
    assert torch.equal(logits(model), expected)


@BOTH
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_last_layer_that_is_not_finite_leaves_the_first_unmerged(tuner, call):
    model = adapted(tuner, **one_expert(tuner))
    weights = base_weights(model)
    last = layers(model)[-1]
    names = [name for name in last.adapter_layer_names if "default" in getattr(last, name)]
    broken = getattr(last, names[-1])["default"].weight
    good = broken.detach().clone()
    broken.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        getattr(model, call)(safe_merge=True)
    broken.data.copy_(good)
    unchanged(model, weights, logits(model))
    assert isinstance(model, PeftModel)
    assert len(layers(model)) == 4
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged_adapters == ["default"] for layer in layers(model))


@BOTH
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_last_layer_that_cannot_be_merged_leaves_the_first_unmerged(tuner, call):
    model = adapted(tuner, **one_expert(tuner))
    weights, expected = base_weights(model), logits(model)
    layers(model)[-1].base_layer.weight = nn.Parameter(
        layers(model)[-1].base_layer.weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(MergeError, match="cannot be merged into a Linear"):
        getattr(model, call)()
    layers(model)[-1].base_layer.weight = nn.Parameter(weights[-1], requires_grad=False)
    unchanged(model, weights, expected)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_as_trls_grpo_calls_it(call):
    """It merges before every generation with vLLM: a routed adapter is refused at once, with the ways out."""
    model = adapted("multi")
    weights, expected = base_weights(model), logits(model)
    with pytest.raises(MergeError, match=r"GRPO with use_vllm=True.*use_vllm=False.*num_experts=1"):
        getattr(model, call)()
    unchanged(model, weights, expected)


def test_grpo_reads_the_merged_weights_by_the_bases_names():
    """What TRL does with a model that can be merged: names without `base_layer`, and none of the adapter's own."""
    base = llama()
    names = {name for name, _ in base.named_parameters()}
    for tuner in CONFIGS:
        model = adapted(tuner, llama(), **one_expert(tuner))
        expected = logits(model)
        model.merge_adapter()
        read = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.data
            for name, parameter in model.named_parameters()
            if model.prefix not in name
        }
        assert set(read) == names
        merged = llama().double()
        merged.load_state_dict(read, strict=False)
        torch.testing.assert_close(logits(merged), expected, atol=1e-12, rtol=0)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-12, rtol=0)


def test_named_adapters_alone_decide():
    """Layers of a routed adapter do not stand in the way of merging another."""
    model = adapted("multi", num_experts=1)
    model.add_adapter("routed", MultiLoraConfig(target_modules=["v_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "routed"])
    with pytest.raises(MergeError, match="'routed'"):
        model.merge_adapter()
    assert not any(layer.merged_adapters for layer in layers(model))
    model.merge_adapter(adapter_names=["default"])
    assert {name for layer in layers(model) for name in layer.merged_adapters} == {"default"}
