"""In-place operations around an adapted layer, and gradients through adapters that are frozen in part or whole."""

import itertools

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from two_layers import METHODS, RARE, K, adapted, expected, factors, formula, loss_of

from braidlora import FactoredLoraConfig, MultiLoraConfig


@pytest.fixture(
    params=[
        pytest.param((6,), id="2-D", marks=RARE), pytest.param((3, 5), id="3-D"),
        pytest.param((2, 3, 2), id="4-D", marks=RARE),
    ]
)  # fmt: skip
def x(request):
    torch.manual_seed(1)
    return torch.randn(*request.param, K, dtype=torch.float64)


AFTER = {
    "relu_": lambda y: nn.functional.relu(y, inplace=True),
    "+=": lambda y: y.add_(1.5),
    "*=": lambda y: y.mul_(3.0),
    "clamp_": lambda y: y.clamp_(-0.2, 0.3),
    "masked_fill_": lambda y: y.masked_fill_(y > 0.1, -1.0),
    "index": lambda y: y.__setitem__((..., 0), 2.0) or y,
    "a view": lambda y: y.transpose(0, 1).mul_(2.0).transpose(0, 1),
    "a slice": lambda y: y[..., :2].add_(1.0) is None or y,
    "dropout": lambda y: nn.functional.dropout(y, 0.0, inplace=True),
    "copy_": lambda y: y.copy_(y * 2),
}


@pytest.mark.parametrize("how", AFTER)
@pytest.mark.parametrize("method", METHODS)
def test_in_place_after_a_layer(method, how, x):
    assert_right_after(method, how, x)


@pytest.mark.parametrize("shape", [(6, K), (2, 3, 2, K)], ids=["2-D", "4-D"])
@pytest.mark.parametrize("method", METHODS)
def test_in_place_after_a_layer_for_other_shapes(method, shape):
    for how in ("relu_", "+=", "a view"):
        assert_right_after(method, how, torch.randn(shape, dtype=torch.float64))


def assert_right_after(method, how, x):
    net = adapted(method)

    def right(x):
        h = formula(net.first, x).clone()
        return formula(net.second, AFTER[how](h))

    def ours(x):
        return net.second(AFTER[how](net.first(x)))

    for run in (ours, lambda x: checkpoint(ours, x.requires_grad_(), use_reentrant=False),
                lambda x: checkpoint(ours, x.requires_grad_(), use_reentrant=True)):  # fmt: skip
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        inputs = [p for p in net.parameters() if p.requires_grad]
        net.zero_grad()
        loss_of(run(a)).backward()
        found = [a.grad, *(p.grad for p in inputs)]
        wanted = torch.autograd.grad(loss_of(right(b)), [b, *inputs])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), right(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_an_ordinary_tensor(method, x):
    net = adapted(method)
    for needs in (True, False):
        y = net.first(x.clone().requires_grad_(needs))
        assert not y._is_view()
        assert y.is_contiguous()
    quantised_alike = adapted(method)
    quantised_alike.first.base_layer.__class__ = type("OtherLinear", (nn.Linear,), {})
    assert not quantised_alike.first(x)._is_view()


@pytest.mark.parametrize("who", ["pre-hook", "pre-hook on all", "base layer"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_base_layer_that_changes_its_input(method, who, fused, x):
    """Base and adapter read the changed input, as with PEFT's LoRA, and so does whoever uses it afterwards."""
    net = adapted(method, fused=fused)
    layer = net.first

    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2.0))

    def run(x):
        h = x * 1.0  # a leaf must not be changed in place
        return layer(h), h

    if who == "pre-hook":
        layer.base_layer.register_forward_pre_hook(lambda m, i: _double(i))
        handle = None
    elif who == "base layer":
        layer.base_layer.__class__, handle = Doubling, None
    else:
        handle = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda m, i: _double(i) if m is layer.base_layer else None
        )
    try:
        x = x.requires_grad_()
        y, h = run(x)
        ours = torch.autograd.grad(
            loss_of(y) + loss_of(h), [x, *(f for f in factors(layer) if f.requires_grad)]
        )
    finally:
        if handle is not None:
            handle.remove()
    right = formula(layer, 2.0 * x)
    wanted = torch.autograd.grad(
        loss_of(right) + loss_of(2.0 * x), [x, *(f for f in factors(layer) if f.requires_grad)]
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def _double(inputs):
    inputs[0].mul_(2.0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_any_part_frozen(method, dropout, fused, x):
    """Whatever is trained, with and without a gradient of x, its gradients are those of full training."""
    net = adapted(method, lora_dropout=dropout, fused=fused)
    layer = net.first
    weights = factors(layer)[:4]

    def run(trained, needs_x, h=None):
        for weight, train in zip(weights, trained, strict=True):
            weight.requires_grad_(train)
        inputs = [w for w, train in zip(weights, trained, strict=True) if train]
        start = x.detach().clone().requires_grad_(needs_x)
        torch.manual_seed(3)
        y = layer(start)
        assert y.requires_grad == (needs_x or any(trained))
        inputs = ([start] if needs_x else []) + inputs
        return torch.autograd.grad(loss_of(y), inputs) if inputs else []

    full = run([True] * len(weights), True)
    for trained in itertools.product([False, True], repeat=len(weights)):
        for needs_x in (False, True):
            found = iter(run(trained, needs_x))
            for needed, whole in zip((needs_x, *trained), full, strict=True):
                if needed:
                    torch.testing.assert_close(next(found), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [None, True, False], ids=["whole", "reentrant", "non-reentrant"])
def test_input_gradients_through_a_frozen_adapter(method, how, x):
    net = adapted(method).requires_grad_(False)
    run = net if how is None else (lambda x: checkpoint(net, x, use_reentrant=how))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss_of(run(a).mul_(2.0)).backward()
    loss_of(expected(net, b).mul(2.0)).backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)
    assert all(p.grad is None for p in net.parameters())


def tiny(name, head="ForCausalLM", **settings):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **settings,
    }
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, name + head)(config).double()


MODELS = {
    "Olmo, clip_qkv": lambda: tiny("Olmo", clip_qkv=0.05, intermediate_size=48, pad_token_id=0),
    "Falcon, old": lambda: tiny("Falcon", alibi=False, parallel_attn=False, bias=True, new_decoder_architecture=False),
    "Falcon, new": lambda: tiny("Falcon", new_decoder_architecture=True, num_kv_heads=2),
    "OPT": lambda: tiny("OPT", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32, pad_token_id=0),
    "Bloom": lambda: tiny("Bloom", n_head=4, n_layer=2),
    "GPT-2": lambda: tiny("GPT2", "LMHeadModel", n_positions=32),
    "Phi": lambda: tiny("Phi", intermediate_size=48),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("method", "name", "checkpointing"),
    [
        pytest.param(method, name, checkpointing, id=f"{method}-{name}-{how}", marks=() if common else RARE)
        for method in ("B", "factored")
        for name in MODELS
        for how, checkpointing in (("whole", None), ("reentrant", True), ("non-reentrant", False))
        for common in [name.startswith("Olmo") if method == "factored" or how != "whole" else True]
    ],
)
def test_real_models_with_in_place_operations(method, name, checkpointing):
    """The fused path's loss and gradients are those of the plain path, and training goes on as with PEFT's LoRA."""
    ids = torch.arange(24).view(2, 12) % 64

    def run(config):
        torch.manual_seed(0)
        model = get_peft_model(MODELS[name](), config, autocast_adapter_dtype=False).double().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss, [p.grad for p in model.parameters() if p.requires_grad]

    def ours(fused):
        settings = {"target_modules": "all-linear", "init_weights": False, "fused": fused}
        return FactoredLoraConfig(**settings) if method == "factored" else MultiLoraConfig(**settings)

    run(LoraConfig(target_modules="all-linear"))
    (loss, gradients), (plain_loss, plain) = run(ours(True)), run(ours(False))
    torch.testing.assert_close(loss, plain_loss, atol=1e-10, rtol=1e-10)
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
