"""A small network with two adapted layers in float64, and the same network written as its formula says."""

import pytest
import torch
from expert_loop import expert_loop
from peft import get_peft_model
from torch import nn

from braidlora import FactoredLoraConfig, MultiLoraConfig

METHODS = ["B", "A", "none", "factored"]
# Of a long list of alike cases those that `make test-slow` alone runs.
RARE = pytest.mark.slow
K, H, D = 12, 10, 7


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, H), nn.Linear(H, D, bias=False)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


def adapted(method="B", **settings):
    """The network in float64, in training mode, all factors random."""
    torch.manual_seed(7)
    settings = {"r": 4, "target_modules": ["first", "second"], "init_weights": False, **settings}
    if method == "factored":
        config = FactoredLoraConfig(r_intermediate=5, **settings)
    else:
        config = MultiLoraConfig(share=method, num_experts=3, **settings)
    net = get_peft_model(TwoLayers().double(), config).base_model.model
    return net.double().train()


def factors(layer):
    """The weights of one layer's adapter, in the formula's order."""
    if hasattr(layer, "factoredlora_A"):
        return [
            getattr(layer, f"factoredlora_{name}")["default"].weight
            for name in ("A", "M", "B1", "B2", "base")
        ]
    return [getattr(layer, f"braidlora_{name}")["default"].weight for name in ("A", "router", "B")]


def formula(layer, x):
    """One layer as its formula says, with no code of the package."""
    base, scaling = layer.base_layer, layer.scaling["default"]
    if hasattr(layer, "factoredlora_A"):
        A, M, B1, B2, B = factors(layer)
        return nn.functional.linear(x, base.weight, base.bias) + scaling * x @ ((B + B2 @ B1) @ M @ A).T
    share = layer.gate["default"].share
    return expert_loop(x, base.weight, base.bias, *factors(layer), share=share, N=3, scaling=scaling)


def expected(net, x):
    return formula(net.second, nn.functional.gelu(formula(net.first, x)))


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def loss_of(y):
    return y.pow(3).sum() + y.cos().sum()


def gradients(run, net, x):
    """Of the loss with respect to x and all that is trained, by `backward`: as training does it."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    loss_of(run(x)).backward()
    return [x.grad, *(p.grad.clone() for p in trained(net))]


def assert_right(run, net, x, tolerance=1e-9):
    """`run(x)` has the formula's value and gradients."""
    torch.testing.assert_close(run(x), expected(net, x), atol=tolerance, rtol=tolerance)
    wanted = gradients(lambda x: expected(net, x), net, x)
    for ours, right in zip(gradients(run, net, x), wanted, strict=True):
        torch.testing.assert_close(ours, right, atol=tolerance, rtol=tolerance)
