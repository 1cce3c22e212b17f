"""Second derivatives, function transforms, forward-mode AD and tracing: as for a layer in plain operations."""

import pytest
import torch
from torch import nn
from two_layers import METHODS, RARE, K, adapted, expected, loss_of, trained

from braidlora.adapters import _fused

# Plain operations have their derivatives from torch, whatever is shared.
BOTH_METHODS = pytest.mark.parametrize(
    ("fused", "method"),
    [
        pytest.param(fused, method, marks=() if fused or method in ("B", "factored") else RARE)
        for fused in (True, False)
        for method in METHODS
    ],
)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 2, K, dtype=torch.float64)


def close(ours, right):
    for a, b in zip(
        torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(right), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


@BOTH_METHODS
def test_second_and_third_order(method, fused, x):
    net = adapted(method, fused=fused)
    x = x.requires_grad_()
    inputs = [x, *trained(net)]

    def orders(run):
        first = torch.autograd.grad(loss_of(run(x)), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), inputs)
        return first, second, [g / g.abs().max() for g in third]

    close(orders(net), orders(lambda x: expected(net, x)))


@pytest.mark.parametrize("method", ["none", "factored"])
def test_gradgradcheck(method):
    layer = adapted(method, r=2).first
    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *w: layer(x), (x, *trained(layer)))


@pytest.mark.parametrize("method", ["B", "factored"])
def test_second_order_with_dropout_uses_the_same_mask(method, x, monkeypatch):
    net = adapted(method, lora_dropout=0.4)
    x = x.requires_grad_()
    inputs = [x, *trained(net)]

    def second(fused):
        for layer in (net.first, net.second):
            layer.fused["default"] = fused
        torch.manual_seed(5)
        first = torch.autograd.grad(loss_of(net(x)), inputs, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    mask = (torch.rand(x.numel() // K, K) > 0.4).double() / 0.6
    masks = {K: mask, 10: (torch.rand(x.numel() // K, 10) > 0.4).double() / 0.6}
    monkeypatch.setattr(
        torch, "native_dropout", lambda x, p, train: (x * masks[x.shape[-1]], masks[x.shape[-1]] != 0)
    )
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p: x * masks[x.shape[-1]].view_as(x))
    close(second(True), second(False))


@BOTH_METHODS
def test_torch_func(method, fused, x):
    net = adapted(method, fused=fused)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(run):
        return lambda p, x: loss_of(torch.func.functional_call(net, p, (x,)) if run is net else run(p, x))

    class Formula(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return expected(self.net, x)

    formula = Formula()

    def reference(p, x):
        return loss_of(torch.func.functional_call(formula, {f"net.{name}": v for name, v in p.items()}, (x,)))

    ours = loss(net)
    trainable = {name: parameters[name] for name, p in net.named_parameters() if p.requires_grad}
    tangents = (
        {name: torch.randn_like(p) for name, p in trainable.items()}, torch.randn_like(x)
    )  # fmt: skip
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(trainable, x),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0))(trainable, x[:, None]),
        lambda f: torch.func.jvp(f, (trainable, x), tangents),
        lambda f: torch.func.vjp(f, trainable, x)[1](torch.ones((), dtype=x.dtype)),
        lambda f: torch.func.jacrev(f, 1)(trainable, x),
        lambda f: torch.func.jacfwd(f, 1)(trainable, x),
        lambda f: torch.func.hessian(f, 1)(trainable, x),
        lambda f: torch.func.jvp(lambda x: torch.func.grad(f, 1)(trainable, x), (x,), (torch.ones_like(x),)),
    ):
        close(transform(ours), transform(lambda p, x: reference({**parameters, **p}, x)))


@BOTH_METHODS
def test_torch_autograd_functional(method, fused, x):
    net = adapted(method, fused=fused)
    right = lambda x: expected(net, x)  # noqa: E731
    functional, v = torch.autograd.functional, torch.randn_like(x)
    for of in (
        lambda f: functional.jacobian(f, x),
        lambda f: functional.jacobian(f, x, vectorize=True),
        lambda f: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
        lambda f: functional.hessian(lambda x: loss_of(f(x)), x),
        lambda f: functional.hessian(lambda x: loss_of(f(x)), x, vectorize=True),
        lambda f: functional.hvp(lambda x: loss_of(f(x)), x, v),
        lambda f: functional.vhp(lambda x: loss_of(f(x)), x, v),
    ):
        close(of(net), of(right))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_many_outputs_at_once(method, x):
    """The forward ran as always; its backward is run under vmap."""
    net = adapted(method)
    x = x.requires_grad_()
    y = net(x)
    basis = torch.eye(y.numel(), dtype=x.dtype).view(-1, *y.shape)
    inputs = [x, *trained(net)]
    right = expected(net, x)
    close(
        torch.autograd.grad(y, inputs, basis, is_grads_batched=True),
        torch.autograd.grad(right, inputs, basis, is_grads_batched=True),
    )


@BOTH_METHODS
def test_forward_mode(method, fused, x):
    net = adapted(method, fused=fused)
    from torch.autograd import forward_ad

    def tangent(run):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    close(tangent(net), tangent(lambda x: expected(net, x)))

    def tangent_of_gradient(run):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach().requires_grad_(), torch.ones_like(x))
            return forward_ad.unpack_dual(torch.autograd.grad(loss_of(run(dual)), dual)[0]).tangent

    close(tangent_of_gradient(net), tangent_of_gradient(lambda x: expected(net, x)))


@pytest.mark.parametrize("method", ["B", "factored"])
def test_a_dual_gradient_for_an_ordinary_forward(method, x):
    net = adapted(method)
    from torch.autograd import forward_ad

    def tangent(run):
        start = x.detach().clone().requires_grad_()
        y = run(start)
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 0.5))
            return forward_ad.unpack_dual(torch.autograd.grad(y, start, upstream)[0]).tangent

    close(tangent(net), tangent(lambda x: expected(net, x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_traced_layer_can_be_saved(method, x, tmp_path):
    net = adapted(method).eval()
    traced = torch.jit.trace(net, (x,))
    traced.save(str(tmp_path / "net.pt"))
    close(torch.jit.load(str(tmp_path / "net.pt"))(x), expected(net, x))


@pytest.mark.parametrize("strict", [pytest.param(True, marks=RARE), False])
def test_torch_export(strict, x, tmp_path):
    net = adapted().eval()
    program = torch.export.export(net, (x,), strict=strict)
    torch.export.save(program, tmp_path / "net.pt2")
    close(torch.export.load(tmp_path / "net.pt2").module()(x), expected(net, x))


@pytest.mark.parametrize("method", ["B", "factored"])
def test_the_switch(method, x, monkeypatch):
    called = []
    for function in (_fused.Shrink, _fused.Expand, _fused.AdaptedLinear):
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *a, apply=apply: called.append(1) or apply(*a))
    adapted(method, fused=False)(x)
    assert not called
    net = adapted(method)
    net(x)
    per_layer = 2 if method == "factored" else 1
    assert len(called) == 2 * per_layer
    net.first.fused["default"] = False
    net(x)
    assert len(called) == 3 * per_layer
