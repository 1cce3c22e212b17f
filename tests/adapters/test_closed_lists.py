"""PEFT's functions that know its own types alone: on ours they work, or say what they are for."""

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from tiny import CONFIGS, PREFIXES, adapted, config, llama, logits

BOTH = pytest.mark.parametrize("tuner", CONFIGS)


@BOTH
def test_status(tuner):
    model = adapted(tuner)
    model.add_adapter("other", config(tuner, target_modules=["up_proj"]))
    status = model.get_model_status()
    assert (status.available_adapters, status.active_adapters) == (["default", "other"], ["default"])
    assert status.num_adapter_layers == 6
    assert {tuple(layer.available_adapters) for layer in model.get_layer_status()} == {
        ("default",),
        ("other",),
    }


@BOTH
def test_disable_input_dtype_casting(tuner):
    model = adapted(tuner)
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)


@BOTH
def test_init_lora_weights_can_be_read_and_set(tuner):
    made = config(tuner)
    assert made.init_lora_weights is made.init_weights is False
    made.init_lora_weights = True
    assert made.init_weights is True
    assert "init_lora_weights" not in made.to_dict()


@BOTH
def test_what_is_for_lora_alone_says_so(tuner, tmp_path):
    model = adapted(tuner)
    expected = logits(model)
    kind = PREFIXES[tuner].upper().rstrip("_")
    with pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        peft.initialize_lora_eva_weights(model, [])
    with pytest.raises(ValueError, match=f"'{kind}' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(llama(), config(tuner), mixed=True)
    with pytest.raises(ValueError, match=r"not supported for (Multi|Factored)LoraModel"):
        model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "b"))
    if tuner == "multi":
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            peft.convert_to_lora(model, rank=4)
    assert torch.equal(logits(model), expected)
