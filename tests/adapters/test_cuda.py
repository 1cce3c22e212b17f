"""The layer on a CUDA device: its own kernels, precision, counted costs, capture into a graph."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accounting import saved_for_backward, traffic
from expert_loop import expert_loop
from peft import get_peft_model
from torch import nn

from braidlora import MultiLoraConfig
from braidlora.adapters import _fused

SHARES = ["B", "A", "none"]
K, D = 256, 192


class OneLayer(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(K, D, dtype=dtype, device="cuda")


def adapted(share, N, r, dtype, **settings):
    torch.manual_seed(0)
    settings = {"lora_dropout": 0.0, "init_weights": False, "router_temperature": 0.8, **settings}
    config = MultiLoraConfig(share=share, num_experts=N, r=r, target_modules=["layer"], **settings)
    return get_peft_model(OneLayer(dtype), config).base_model.model.layer.train()


def weights(layer):
    modules = [getattr(layer, f"braidlora_{name}") for name in ("A", "router", "B")]
    return [module["default"].weight for module in modules if "default" in module]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize(("N", "r"), [(1, 8), (2, 1), (2, 5), (3, 8), (8, 8), (8, 64), (20, 3)])
@pytest.mark.parametrize("share", SHARES)
def test_forward_and_gradients(share, N, r, dtype, tolerance):
    layer = adapted(share, N, r, dtype)
    x = torch.randn(3, 67, K, device="cuda", dtype=dtype, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, [x, *weights(layer)], upstream)]

    base = layer.base_layer
    exact = [t.detach().double().cpu().requires_grad_() for t in [x, *weights(layer)]]
    A, *router, B = exact[1:]
    expected = expert_loop(
        exact[0], base.weight.double().cpu(), base.bias.double().cpu(), A, router[0] if router else None, B,
        share=share, N=N, scaling=layer.scaling["default"], temperature=0.8,
    )  # fmt: skip
    reference = [expected, *torch.autograd.grad(expected, exact, upstream.double().cpu())]
    for a, b in zip(ours, reference, strict=True):
        assert ((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()).item() < tolerance


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_are_used():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the plain operations are used")
    z = torch.randn(5, 32, device="cuda")
    assert _fused._kernels(z, _fused.Gate("B", 3, 8, 1.0, 0.0)) is not None
    assert _fused._kernels(z, _fused.Gate("B", 3, 8, 1.0, 0.1)) is None
    assert _fused._kernels(z.double(), _fused.Gate("B", 3, 8, 1.0, 0.0)) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("share", SHARES)
def test_counted_costs(share):
    units = []
    for N in (2, 3, 8):
        layer = adapted(share, N, 8, torch.bfloat16)
        layer.base_layer = nn.Linear(K, K, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
        layer.braidlora_B["default"] = nn.Linear(weights(layer)[2].shape[1], K, bias=False, device="cuda")
        x = torch.randn(1024, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        base = traffic(layer.base_layer, x, torch.randn_like(x))
        x.grad = None
        units.append(traffic(layer, x, torch.randn_like(x)) - base)
        kept, _ = saved_for_backward(layer, x)
        activations = [t.untyped_storage().nbytes() for t in kept if t.shape[0] == 1024]
        assert sum(activations) <= 1024 * (N * 8 + 2 * N + 8) * 2
    assert units[0] == units[1] == units[2] <= 10.0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_autocast(autocast):
    layer = adapted("B", 3, 8, torch.float32, lora_dropout=0.3)
    x = torch.randn(64, K, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    y.float().square().mean().backward()
    for gradient in (x.grad, *(w.grad for w in weights(layer))):
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_with_inductor_equals_eager():
    layer = adapted("B", 3, 8, torch.float32)
    x = torch.randn(64, K, device="cuda", requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    upstream = torch.randn(64, D, device="cuda")
    for a, b in zip(
        torch.autograd.grad(compiled(x), [x, *weights(layer)], upstream),
        torch.autograd.grad(layer(x), [x, *weights(layer)], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
from braidlora.adapters import _fused, _triton_gate
for share in ("B", "A", "none"):
    for N, r in ((2, 1), (3, 8), (5, 6)):
        gate = _fused.Gate(share, N, r, 1.3, 0.0)
        G, U = _fused.stacked_ranks(share, N, r)
        z, du = torch.randn(77, G + N + _fused.padding_for(gate, G)), torch.randn(77, U)
        torch.testing.assert_close(_triton_gate.gate_forward(z, share, N, r, 1.3), _fused._gated(z, gate))
        kernels = _triton_gate.gate_backward(du, z, share, N, r, 1.3, 2.0)
        for a, b in zip(kernels, _fused._gated_backward(du, z, 2.0, gate)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_in_tritons_interpreter():
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    subprocess.run(
        [sys.executable, "-c", INTERPRETED], check=True, env=environment, cwd=Path(__file__).parent
    )
