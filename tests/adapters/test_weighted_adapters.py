"""`add_weighted_adapter`. Reference: the sum of what each adapter alone adds to a layer's output, in float64."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CONFIGS, adapted, config, layers, llama, logits, trainable

from braidlora.errors import ConfigError

WEIGHTS = {"a": 0.75, "b": -1.5, "c": 2.0}
KINDS = {
    "one expert": ("multi", {"num_experts": 1}),
    "B": ("multi", {"share": "B"}),
    "A": ("multi", {"share": "A"}),
    "none": ("multi", {"share": "none"}),
    "uniform B": ("multi", {"share": "B", "gate": "uniform"}),
    "uniform A": ("multi", {"share": "A", "gate": "uniform"}),
    "uniform none": ("multi", {"share": "none", "gate": "uniform"}),
    "factored": ("factored", {}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def three(kind, **settings):
    """Adapters a, b, c of other ranks, alphas and targets; routers, where there are any, are alike."""
    tuner, common = KINDS[kind]
    common = {**common, **settings}
    model = adapted(tuner, name="a", **common)
    model.add_adapter(
        "b", config(tuner, r=6, lora_alpha=9, use_rslora=True, target_modules=["v_proj", "up_proj"], **common)
    )
    model.add_adapter("c", config(tuner, r=3, rank_pattern={"q_proj": 5}, **common))
    model = model.double().eval()
    share_routers(model)
    return model


def share_routers(model):
    for layer in layers(model):
        routers = list(getattr(layer, "braidlora_router", {}).values())
        for router in routers[1:]:
            router.weight.data.copy_(routers[0].weight)


def added(layer, adapters):
    """What the adapters add to the layer's output, one by one: {name: (T, d)}."""
    x = torch.linspace(-1, 1, 5 * layer.in_features, dtype=torch.float64).view(5, layer.in_features).sin()
    before = layer.active_adapters
    results = {}
    for name in adapters:
        if layer.has_adapter(name):
            layer.set_adapter(name)
            results[name] = (layer(x) - layer.base_layer(x)).detach()
    layer.set_adapter(before)
    return results


def check_sum(model, weights, name="sum"):
    for layer in layers(model):
        expected = [weights[adapter] * y for adapter, y in added(layer, weights).items()]
        given = added(layer, [name])
        assert bool(expected) == bool(given)
        if expected:
            torch.testing.assert_close(given[name], sum(expected), atol=1e-12, rtol=0)


def test_cat_is_the_weighted_sum(kind, tmp_path):
    model = three(kind)
    alone, trained = logits(model), trainable(model)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    check_sum(model, WEIGHTS)
    assert torch.equal(logits(model), alone)
    assert trainable(model) == trained, "it is inactive and frozen"
    assert model.peft_config["sum"].r == 4 + 6 + 3, "of v_proj; q_proj has 4 + 5, filled up with zeros"
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path / "sum")
    assert torch.equal(logits(loaded.eval()), expected)


def test_one_adapter_can_be_copied_and_scaled(kind):
    model = three(kind)
    model.add_weighted_adapter(["b"], [0.5], "sum", "cat")
    check_sum(model, {"b": 0.5})
    assert [layer.has_adapter("sum") for layer in layers(model)] == [
        layer.has_adapter("b") for layer in layers(model)
    ]


@pytest.mark.parametrize("kind", ["one expert", "factored", "uniform B", "uniform A", "uniform none"])
def test_svd_of_full_rank_is_the_weighted_sum(kind):
    model = three(kind)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", svd_rank=32)
    check_sum(model, WEIGHTS)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "low", svd_rank=2)
    for layer in layers(model):
        total = sum(w * layer.get_delta_weight(n) for n, w in WEIGHTS.items() if layer.has_adapter(n))
        U, S, Vh = torch.linalg.svd(total)
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        torch.testing.assert_close(layer.get_delta_weight("low"), best, atol=1e-10, rtol=0)


@pytest.mark.parametrize("how", ["svd", "linear", "cat"])
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.5, -0.5]])
def test_one_expert_is_combined_as_pefts_lora(how, weights):
    ours = adapted("multi", name="a", num_experts=1, lora_alpha=6)
    lora = get_peft_model(
        llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]), adapter_name="a"
    )
    ours.add_adapter("b", config("multi", num_experts=1, lora_alpha=10))
    lora.add_adapter("b", LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"]))
    ours, lora = ours.double(), lora.double().eval()
    lora.load_state_dict(
        {name.replace("braidlora_", "lora_"): tensor for name, tensor in ours.state_dict().items()}
    )
    svd = {"svd_clamp": 0.99, "svd_full_matrices": False} if how == "svd" else {}
    for model in (ours, lora):
        model.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=how, **svd)
        model.set_adapter("sum")
    torch.testing.assert_close(logits(ours), logits(lora), atol=1e-6, rtol=0)  # PEFT's weights are float32


@pytest.mark.parametrize("gate", ["token", "uniform"])
@pytest.mark.parametrize(("share", "factor"), [("B", "B"), ("B", "A"), ("A", "A"), ("A", "B"), ("none", "B")])
def test_linear_of_several_experts_where_one_factor_is_common(share, factor, gate):
    model = adapted("multi", name="a", share=share, gate=gate)
    model.add_adapter("b", config("multi", share=share, gate=gate, lora_alpha=40))
    model = model.double().eval()
    share_routers(model)
    with pytest.raises(ConfigError, match=r"share neither A nor B at .*'cat'"):
        model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "sum", "linear")
    for layer in layers(model):
        common = getattr(layer, f"braidlora_{factor}")
        common["b"].weight.data.copy_(common["a"].weight)
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "sum", "linear")
    check_sum(model, {"a": 0.3, "b": 0.7})
    assert model.peft_config["sum"].r == 4


def test_what_has_no_meaning_is_refused_and_nothing_is_added(kind):
    model = three(kind)
    names = {name for name, _ in model.named_parameters()}
    a_b = (["a", "b"], [1.0, 1.0])
    cases = [
        (([], [], "sum", "cat"), "0 adapters and 0 weights"),
        ((["a", "b"], [1.0], "sum", "cat"), "2 adapters and 1 weights"),
        ((["a", "z"], [1.0, 1.0], "sum", "cat"), "no adapter 'z'; known are 'a', 'b', 'c'"),
        ((["a", "b"], [1.0, math.nan], "sum", "cat"), "must be finite"),
        ((*a_b, "c", "cat"), "an adapter 'c' exists already"),
        ((*a_b, "sum", "ties"), "'ties'; it must be one of 'svd', 'linear', 'cat'"),
        ((*a_b, "sum", "cat", None, None, True, None, 0.5), "without density"),
    ]
    if kind in ("A", "B", "none"):
        cases.append(((*a_b, "sum"), "has a router, so its update is not a matrix"))
    if kind == "factored":
        cases.append(((*a_b, "sum", "linear"), "does not add their updates"))
    else:
        cases.append(((*a_b, "sum", "linear"), "different ranks at model.layers.0.self_attn.v_proj"))
    for arguments, said in cases:
        with pytest.raises(ConfigError, match=said):
            model.add_weighted_adapter(*arguments)
        assert {name for name, _ in model.named_parameters()} == names
        assert set(model.peft_config) == {"a", "b", "c"}


def test_routed_adapters_must_be_routed_alike():
    model = three("B")
    layer = layers(model)[1]
    layer.braidlora_router["b"].weight.data[0, 0] += 1e-9
    with pytest.raises(
        ConfigError, match=r"routers of 'a' and 'b' differ at model\.layers\.0\.self_attn\.v_proj"
    ):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    for change in (
        {"num_experts": 2},
        {"share": "A"},
        {"router_temperature": 2.0},
        {"num_experts": 1},
        {"gate": "uniform"},
    ):
        model = adapted("multi", name="a")
        model.add_adapter("b", config("multi", **change))
        with pytest.raises(
            ConfigError, match=r"routed differently \('a': share='B', num_experts=3.*gate='token'; "
        ):
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")


@pytest.mark.parametrize("tuner", CONFIGS)
@pytest.mark.parametrize(
    "setting", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}, {"bias": "all"}]
)
def test_what_is_trained_beside_the_factors_has_no_sum(tuner, setting):
    model = adapted(tuner, name="a", **setting)
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}=.*weighted sums do not support"):
        model.add_weighted_adapter(["a"], [1.0], "sum", "cat")
