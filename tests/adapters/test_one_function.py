"""A layer on a plain frozen linear base is one autograd function: the same bits as two around the base layer's call."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from two_layers import K, adapted, loss_of

from braidlora.adapters import _fused, _gate

SHARES = ["B", "A", "none"]


@pytest.fixture
def calls(monkeypatch):
    """Which of the functions ran, by name."""
    names = []
    for function in (_fused.Shrink, _fused.Expand, _fused.AdaptedLinear):
        name, apply = function.__name__, function.apply
        monkeypatch.setattr(
            function, "apply", lambda *a, name=name, apply=apply: names.append(name) or apply(*a)
        )
    return names


def run(net, x, needs_x=True):
    x = x.detach().clone().requires_grad_(needs_x)
    net.zero_grad()
    torch.manual_seed(3)
    y = net(x)
    loss_of(y).backward()
    return [
        y.detach(),
        *([x.grad] if needs_x else []),
        *(p.grad.clone() for p in net.parameters() if p.requires_grad),
    ]


def in_two(net):
    for layer in (net.first, net.second):
        layer._forward_in_one = lambda *a: None
    return net


@pytest.mark.parametrize(
    "settings", [{}, {"lora_dropout": 0.3}, {"router_temperature": 0.5}, {"balance_loss": 0.1}], ids=str
)
@pytest.mark.parametrize(("base", "dtype"), [("float64", "float64"), ("bfloat16", "float32")])
@pytest.mark.parametrize("many", [0, 2**15], ids=["padded", "not padded"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.filterwarnings("ignore:balance_loss")
def test_the_same_bits_as_two(share, many, base, dtype, settings, calls, monkeypatch):
    monkeypatch.setattr(_gate, "_MANY", many)

    def net():
        made = adapted(share, **settings).to(getattr(torch, dtype))
        for layer in (made.first, made.second):
            layer.base_layer.to(getattr(torch, base))
        return made

    torch.manual_seed(1)
    for shape in ((70, K), (6, K), (2, 3, K), (0, K)):
        x = torch.randn(shape).to(getattr(torch, base))
        for needs_x in (True, False):
            calls.clear()
            one = run(net(), x, needs_x)
            assert set(calls) == {"AdaptedLinear"}
            two = run(in_two(net()), x, needs_x)
            assert set(calls) == {"AdaptedLinear", "Shrink", "Expand"}
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def train_the_bias(net, monkeypatch):
    net.first.base_layer.bias.requires_grad_()


def train_the_base(net, monkeypatch):
    net.first.base_layer.weight.requires_grad_()


def hook_the_base(net, monkeypatch):
    net.first.base_layer.register_forward_hook(lambda module, inputs, y: None)


def replace_its_forward(net, monkeypatch):
    own = net.first.base_layer.forward
    net.first.base_layer.forward = lambda x: own(x)


def derive_from_linear(net, monkeypatch):
    net.first.base_layer.__class__ = type("Derived", (nn.Linear,), {})


def patch_the_product(net, monkeypatch):
    own = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: own(*a))


def patch_linear(net, monkeypatch):
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x))


def patch_calls(net, monkeypatch):
    own = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *a, **k: own(self, *a, **k))


CHANGES = [
    train_the_bias, train_the_base, hook_the_base, replace_its_forward, derive_from_linear, patch_the_product,
    patch_linear, patch_calls,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_other_base_layer_is_called(change, calls, monkeypatch):
    net, x = adapted(), torch.randn(3, 5, K, dtype=torch.float64)
    before = net.first(x)
    assert calls == ["AdaptedLinear"]
    change(net, monkeypatch)
    calls.clear()
    assert torch.equal(net.first(x), before)
    assert "AdaptedLinear" not in calls


EARLY = """
import torch
from torch import nn

seen = []

def keep(self, y):
    if type(self) is nn.Linear and self.weight.shape == (8, 8):
        seen.append((y, y.detach().clone()))
    return y

def product(x, W, b=None):
    return keep(W_of[W.shape], own(x, W, b)) if W.shape in W_of else own(x, W, b)

W_of = {{(8, 8): nn.Linear(8, 8)}}
{patch}
from peft import get_peft_model
from braidlora import MultiLoraConfig

net = nn.Sequential(nn.Linear(8, 8))
layer = get_peft_model(net, MultiLoraConfig(r=2, target_modules=["0"], init_weights=False)).base_model.model[0]
seen.clear()
layer(torch.randn(3, 8))
assert len(seen) == 1, seen
assert torch.equal(*seen[0]), "a result that somebody holds was overwritten"
"""
PATCHES = {
    "forward": "own = nn.Linear.forward; nn.Linear.forward = lambda self, x: keep(self, own(self, x))",
    "call": "own = nn.Module.__call__; nn.Module.__call__ = lambda self, *a, **k: keep(self, own(self, *a, **k))",
    "product": "own = nn.functional.linear; nn.functional.linear = product",
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_made_before_the_import_sees_the_base_layer(patch):
    subprocess.run([sys.executable, "-c", EARLY.format(patch=PATCHES[patch])], check=True)


@pytest.mark.parametrize("share", SHARES)
def test_gradients_of_a_graph_may_be_changed_in_place(share):
    net = adapted(share)
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
    loss = loss_of(net(torch.randn(5, K, dtype=torch.float64)))
    for gradient in torch.autograd.grad(loss, weights, create_graph=True):
        gradient.mul_(2.0)


def test_autocast_casts_the_base_layer(calls):
    net = adapted().float()
    x = torch.randn(3, 5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.first(x)
    assert y.dtype == torch.bfloat16
    assert "AdaptedLinear" not in calls
    net.first.base_layer.to(torch.bfloat16)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y = net.first(x.detach().bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    assert calls == ["AdaptedLinear"]


def test_two_adapters_need_two(calls):
    net = adapted()
    layer = net.first
    layer.update_layer("other", _config(layer), 2, 4.0)
    layer.set_adapter(["default", "other"])
    layer(torch.randn(4, K, dtype=torch.float64))
    assert "AdaptedLinear" not in calls


def _config(layer):
    from braidlora import MultiLoraConfig

    return MultiLoraConfig(r=2, num_experts=3, share="B")


def test_the_base_weight_is_kept_for_the_gradient_of_x_alone():
    layer, kept = adapted().first, []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    for needs_x in (True, False):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(4, K, dtype=torch.float64, requires_grad=needs_x))
        assert any(tensor is layer.base_layer.weight for tensor in kept) == needs_x
