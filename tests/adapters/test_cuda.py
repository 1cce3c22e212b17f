"""The layer on a CUDA device: its own kernels, precision, counted costs, checkpointing, capture into a graph.

`BRAIDLORA_CUDA_TESTS_ON=cpu` rehearses them on the CPU, as benchmarks/gpu.py does; what needs CUDA itself is skipped.
"""

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
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM

from braidlora import MultiLoraConfig
from braidlora.adapters import _gate

SHARES = ["B", "A", "none"]
K, D = 256, 192
DEVICE = os.environ.get("BRAIDLORA_CUDA_TESTS_ON", "cuda")
CUDA = torch.cuda.is_available()

on_device = pytest.mark.skipif(DEVICE == "cuda" and not CUDA, reason="no CUDA device")
cuda_itself = pytest.mark.skipif(not CUDA, reason="needs CUDA itself")


class OneLayer(nn.Module):
    def __init__(self, dtype, inputs=K, outputs=D):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, dtype=dtype, device=DEVICE)


# torch tells once that the thread of the backward pass had no context yet; it then makes one.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


def adapted(share, N, r, dtype, widths=(K, D), **settings):
    torch.manual_seed(0)
    settings = {"lora_dropout": 0.0, "init_weights": False, "router_temperature": 0.8, **settings}
    config = MultiLoraConfig(share=share, num_experts=N, r=r, target_modules=["layer"], **settings)
    return get_peft_model(OneLayer(dtype, *widths), config).base_model.model.layer.train()


def weights(layer):
    modules = [getattr(layer, f"braidlora_{name}") for name in ("A", "router", "B")]
    return [module["default"].weight for module in modules if "default" in module]


@pytest.mark.cuda
@on_device
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize(("N", "r"), [(1, 8), (2, 1), (2, 5), (3, 8), (8, 8), (8, 64), (20, 3)])
@pytest.mark.parametrize("share", SHARES)
def test_forward_and_gradients(share, N, r, dtype, tolerance):
    layer = adapted(share, N, r, dtype)
    x = torch.randn(3, 67, K, device=DEVICE, dtype=dtype, requires_grad=True)
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
@on_device
@cuda_itself
def test_the_kernels_are_used():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the plain operations are used")
    z = torch.randn(5, 32, device=DEVICE)
    assert _gate.kernels_for(z, _gate.Gate("B", 3, 8, 1.0, 0.0)) is not None
    assert _gate.kernels_for(z, _gate.Gate("B", 3, 8, 1.0, 0.1)) is None
    assert _gate.kernels_for(z.double(), _gate.Gate("B", 3, 8, 1.0, 0.0)) is None


@pytest.mark.cuda
@on_device
@cuda_itself  # the kernels' own count; tests/adapters/test_gates.py has that of the plain operations
@pytest.mark.parametrize("share", SHARES)
def test_counted_costs(share):
    units, wide = (
        [],
        512,
    )  # so wide that 8 experts of rank 8 are less than a quarter of it, which is not counted
    for N in (2, 3, 8):
        layer = adapted(share, N, 8, torch.bfloat16, widths=(wide, wide))
        x = torch.randn(1024, wide, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        base = traffic(layer.base_layer, x, torch.randn_like(x))
        x.grad = None
        units.append(traffic(layer, x, torch.randn_like(x)) - base)
        kept, _ = saved_for_backward(layer, x)
        activations = [t.untyped_storage().nbytes() for t in kept if t.shape[0] == 1024]
        assert sum(activations) <= 1024 * (N * 8 + 2 * N + 8) * 2
    assert units[0] == units[1] == units[2] <= 10.0


@pytest.mark.cuda
@on_device
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_autocast(autocast):
    layer = adapted("B", 3, 8, torch.float32, lora_dropout=0.3)
    x = torch.randn(64, K, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    y.float().square().mean().backward()
    for gradient in (x.grad, *(w.grad for w in weights(layer))):
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


@pytest.mark.cuda
@on_device
def test_compiled_with_inductor_equals_eager():
    layer = adapted("B", 3, 8, torch.float32)
    x = torch.randn(64, K, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    upstream = torch.randn(64, D, device=DEVICE)
    for a, b in zip(
        torch.autograd.grad(compiled(x), [x, *weights(layer)], upstream),
        torch.autograd.grad(layer(x), [x, *weights(layer)], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def reference_gradients(layer, x, upstream):
    """Gradients of x and the factors in float64 on the CPU, by the loop over experts."""
    exact = [t.detach().double().cpu().requires_grad_() for t in [x, *weights(layer)]]
    A, router, B = exact[1:]
    y = expert_loop(
        exact[0], layer.base_layer.weight.double().cpu(), layer.base_layer.bias.double().cpu(), A, router, B,
        share="B", N=3, scaling=layer.scaling["default"], temperature=0.8,
    )  # fmt: skip
    return torch.autograd.grad(y, exact, upstream.double().cpu())


def assert_near(ours, reference, tolerance=1e-4):
    for a, b in zip(ours, reference, strict=True):
        assert ((a.double().cpu() - b).norm() / b.norm()).item() < tolerance


def keep_products():
    """Selective checkpointing that keeps the results of matrix products and computes the rest again."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


@pytest.mark.cuda
@on_device
@pytest.mark.parametrize("settings", [{"use_reentrant": True}, {"use_reentrant": False},
                                      {"use_reentrant": False, "context_fn": keep_products}],
                         ids=["reentrant", "plain", "selective"])  # fmt: skip
def test_checkpointing_changes_no_gradient(settings):
    layer = adapted("B", 3, 8, torch.float32)
    x = torch.randn(64, K, device=DEVICE, requires_grad=True)
    y = checkpoint(layer, x, **settings)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert_near([x.grad, *(w.grad for w in weights(layer))], reference_gradients(layer, x, upstream))


@pytest.mark.cuda
@on_device
def test_saved_tensors_on_the_cpu_change_no_gradient():
    layer = adapted("B", 3, 8, torch.float32)
    x = torch.randn(64, K, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    upstream = torch.randn_like(y)
    assert_near(
        torch.autograd.grad(y, [x, *weights(layer)], upstream), reference_gradients(layer, x, upstream)
    )


@pytest.mark.cuda
@on_device
def test_an_operation_in_place_after_the_layer():
    layer = adapted("B", 3, 8, torch.float32)
    x = torch.randn(64, K, device=DEVICE, requires_grad=True)
    plain = torch.autograd.grad(torch.relu(layer(x) * 2.0).sum(), [x, *weights(layer)])
    in_place = torch.autograd.grad(layer(x).mul_(2.0).relu_().sum(), [x, *weights(layer)])
    for a, b in zip(in_place, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@on_device
@cuda_itself
def test_a_captured_step_replays_the_same_gradients():
    """Twice over: a buffer that a replay adds into again would show in the second."""
    layer = adapted("B", 3, 8, torch.float32)
    x = torch.randn(64, K, device=DEVICE, requires_grad=True)
    upstream = torch.randn(64, D, device=DEVICE)
    inputs = [x, *weights(layer)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(layer(x), inputs, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        gradients = torch.autograd.grad(y, inputs, upstream)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert_near(gradients, reference_gradients(layer, x, upstream))


@pytest.mark.cuda
@on_device
def test_a_loss_scaler_changes_no_gradient():
    layer = adapted("B", 3, 8, torch.float32)
    x = torch.randn(64, K, device=DEVICE, requires_grad=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    with torch.autocast(DEVICE, torch.float16):
        loss = layer(x).float().square().mean()
    scaled = torch.autograd.grad(scaler.scale(loss), weights(layer))
    upstream = 2.0 * layer(x).detach() / (64 * D)
    reference = reference_gradients(layer, x, upstream)[1:]
    assert_near([gradient / 2.0**12 for gradient in scaled], reference, tolerance=2e-2)


@pytest.mark.cuda
@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_adapters_in_one_batch(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).to(DEVICE, dtype)
    settings = {"target_modules": "all-linear", "init_weights": False, "lora_alpha": 32}
    model = get_peft_model(base, MultiLoraConfig(**settings), adapter_name="one")
    model.add_adapter("two", MultiLoraConfig(share="A", num_experts=2, r=4, **settings))
    model.eval()
    ids = torch.randint(0, 96, (3, 7), device=DEVICE)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["one", "__base__", "two"]).logits
        with model.disable_adapter():
            alone = [model(input_ids=ids).logits[1]]
        for row, name in ((0, "one"), (2, "two")):
            model.set_adapter(name)
            alone.insert(row, model(input_ids=ids).logits[row])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(mixed, torch.stack(alone), atol=tolerance, rtol=tolerance)


INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
from braidlora.adapters import _gate, _triton_gate
from braidlora.adapters.functional import stacked_ranks
for share in ("B", "A", "none"):
    for N, r in ((2, 1), (3, 8), (5, 6)):
        gate = _gate.Gate(share, N, r, 1.3, 0.0)
        G, U = stacked_ranks(share, N, r)
        z, du = torch.randn(77, G + N + _gate.padding_for(gate, G, 10**6)), torch.randn(77, U)
        torch.testing.assert_close(_triton_gate.gate_forward(z, share, N, r, 1.3), _gate.gated(z, gate))
        kernels = _triton_gate.gate_backward(du, z, share, N, r, 1.3, 2.0)
        for a, b in zip(kernels, _gate.gated_backward(du.clone(), z, 2.0, gate)):
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
