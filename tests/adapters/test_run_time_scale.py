"""Scaling at run time, as PEFT's LoRA layers offer it. Reference: PEFT's LoRA itself, and linearity in s."""

import numpy as np
import peft.helpers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CONFIGS, adapted, config, layers, llama

from braidlora.adapters import rescale_adapter_scale
from braidlora.errors import ConfigError
from braidlora.evaluation.digest import model_digests

BOTH = pytest.mark.parametrize("tuner", CONFIGS)


def update(layer):
    x = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).view(3, 32)
    return layer(x) - layer.base_layer(x)


@BOTH
@pytest.mark.parametrize("rslora", [False, True])
def test_the_three_methods_do_what_loras_do(tuner, rslora):
    ours = layers(adapted(tuner, r=4, lora_alpha=6, use_rslora=rslora))[0]
    lora_config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=rslora)
    lora = get_peft_model(llama(), lora_config).base_model.model.model.layers[0].self_attn.q_proj
    whole = update(ours)
    steps = [
        ("set_scale", "default", 0.5), ("scale_layer", 3.0), ("scale_layer", 1), ("unscale_layer", 2.0),
        ("unscale_layer",), ("set_scale", "default", 2.0), ("set_scale", "absent", 9.0), ("unscale_layer", None),
        ("scale_layer", 0.0), ("unscale_layer",),
    ]  # fmt: skip
    for method, *arguments in steps:
        getattr(ours, method)(*arguments)
        getattr(lora, method)(*arguments)
        assert ours.scaling == lora.scaling
        factor = ours.scaling["default"] / ours.configured_scaling("default")
        torch.testing.assert_close(update(ours), factor * whole, atol=1e-12, rtol=0)


@BOTH
def test_only_active_adapters_are_scaled(tuner):
    model = adapted(tuner)
    model.add_adapter("other", config(tuner, lora_alpha=4))
    layer = layers(model)[0]
    before = dict(layer.scaling)
    layer.scale_layer(2.0)
    assert layer.scaling == {"default": 2 * before["default"], "other": before["other"]}


@BOTH
def test_a_context_scales_and_restores(tuner):
    model = adapted(tuner)
    layer = layers(model)[0]
    whole, before = update(layer), dict(layer.scaling)
    with rescale_adapter_scale(model, 0.25):
        torch.testing.assert_close(update(layer), 0.25 * whole, atol=1e-12, rtol=0)
        with rescale_adapter_scale(model, 2):
            torch.testing.assert_close(update(layer), 0.5 * whole, atol=1e-12, rtol=0)
    assert layer.scaling == before
    with pytest.raises(RuntimeError, match="inside"), rescale_adapter_scale(model, 0.5):
        raise RuntimeError("inside")
    assert layer.scaling == before
    with rescale_adapter_scale(model, np.float64(0.5)):
        pass
    with pytest.raises(TypeError, match=r"'0\.5'; it must be a number"), rescale_adapter_scale(model, "0.5"):
        pass


def test_the_context_serves_lora_too():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_alpha=8))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with rescale_adapter_scale(model, 0.5):
        assert layer.scaling == {"default": 1.0}
    assert layer.scaling == {"default": 2.0}
    with pytest.raises(ValueError, match="nothing to scale"), rescale_adapter_scale(llama(), 0.5):
        pass


@BOTH
def test_pefts_own_context_says_that_it_is_for_lora(tuner):
    model = adapted(tuner)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        peft.helpers.rescale_adapter_scale(model, 0.5),
    ):
        pass


@BOTH
def test_a_merged_adapter_is_not_scaled(tuner):
    model = adapted(tuner, **({"num_experts": 1} if tuner == "multi" else {}))
    layer = layers(model)[0]
    weight = layer.base_layer.weight.clone()
    model.merge_adapter()
    for call in (
        lambda: layer.set_scale("default", 0.5),
        lambda: layer.scale_layer(2.0),
        lambda: layer.unscale_layer(2.0),
        lambda: rescale_adapter_scale(model, 0.5).__enter__(),
    ):
        with pytest.raises(ConfigError, match="unmerge_adapter"):
            call()
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight, atol=1e-12, rtol=0)


@BOTH
def test_predictions_of_a_scaled_adapter_are_not_those_of_the_saved_one(tuner):
    model = adapted(tuner)
    lora = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True))
    for wrapped in (model, lora):
        saved = model_digests(wrapped)
        with rescale_adapter_scale(wrapped, 0.5):
            scaled = model_digests(wrapped)
        assert scaled["base"] == saved["base"]
        assert scaled["adapter"] != saved["adapter"]
        assert model_digests(wrapped) == saved
