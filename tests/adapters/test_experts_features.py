"""What PEFT's LoRA offers beyond training, on adapters of stacked experts."""

import peft
import pytest
import torch
from moe_models import EXPERTS, IDS, mixtral

from braidlora import MultiLoraConfig, MultiLoraLayer
from braidlora.adapters import hotswap_adapter, rescale_adapter_scale
from braidlora.adapters._experts import MultiLoraParameter
from braidlora.errors import ConfigError, MergeError

AGAIN = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute",
)


def config(**settings):
    defaults = {"r": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS, "init_weights": False}
    return MultiLoraConfig(**{**defaults, "lora_dropout": 0.0, **settings})


def adapt(seed=1, name="default", **settings):
    torch.manual_seed(seed)
    return peft.get_peft_model(mixtral(), config(**settings), adapter_name=name).eval()


def logits(model, **arguments):
    with torch.no_grad():
        return model(input_ids=IDS, **arguments).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, MultiLoraLayer)]


def test_mixed_batches_are_refused_for_the_adapters_that_adapt_experts():
    model = adapt(name="experts")
    model.add_adapter("linear", config(target_parameters=None))
    model.eval()
    with pytest.raises(ValueError, match=r"experts adapt '.*experts.*', an expert of a mixture of experts"):
        logits(model, adapter_names=["experts", "linear"])
    mixed = logits(model, adapter_names=["linear", "__base__"])
    model.set_adapter("linear")
    torch.testing.assert_close(mixed[0], logits(model)[0])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model)[1])


def test_hotswap(tmp_path):
    other = adapt(
        seed=7, lora_alpha=40, rank_pattern={"experts.down_proj": 2}, alpha_pattern={"down_proj": 3.0}
    )
    other.save_pretrained(tmp_path)
    model = adapt(rank_pattern={"experts.down_proj": 2})
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))
    assert [layer.scaling for layer in layers(model)] == [layer.scaling for layer in layers(other)]


@AGAIN
def test_replace_without_experts():
    model = adapt()
    again = peft.get_peft_model(model.base_model.model, config(target_parameters=None))
    fresh = peft.get_peft_model(mixtral(), config(target_parameters=None))
    assert set(peft.get_peft_model_state_dict(again)) == set(peft.get_peft_model_state_dict(fresh))
    assert not any("experts" in name for name, p in again.named_parameters() if p.requires_grad)
    with again.disable_adapter():
        assert torch.equal(logits(again.eval()), logits(mixtral().eval()))


def test_scaling_at_run_time():
    model = adapt()
    whole = logits(model)
    with model.disable_adapter():
        base = logits(model)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(logits(model), base)
    assert torch.equal(logits(model), whole)


def test_a_weighted_sum_is_refused():
    model = adapt()
    with pytest.raises(ConfigError, match=r"target_parameters=.*weighted sums do not support"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "cat")


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_experts_that_cannot_be_merged_leave_linear_layers_unmerged(call):
    model = adapt(num_experts=1)
    experts = [part for part in layers(model) if isinstance(part, MultiLoraParameter)]
    weights = [layer.base_layer.weight.clone() for layer in layers(model) if layer not in experts]
    experts[-1].braidlora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        getattr(model, call)(safe_merge=True)
    after = [layer.base_layer.weight for layer in layers(model) if layer not in experts]
    assert all(torch.equal(one, other) for one, other in zip(weights, after, strict=True))
    assert not any(layer.merged_adapters for layer in layers(model))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_no_token_at_all(implementation):
    """As a share of a batch on one device may be."""
    model = adapt().train()
    model.get_base_model().set_experts_implementation(implementation)
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    y = experts(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 32)
