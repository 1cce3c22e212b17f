"""What the layer may cost, counted rather than timed, at T tokens of width d = k."""

import pytest
import torch
from accounting import saved_for_backward, traffic
from expert_loop import expert_loop
from peft import LoraConfig, get_peft_model
from torch import nn

from braidlora import MultiLoraConfig

SHARES = ["B", "A", "none"]
T, WIDTH, R = 512, 320, 8


class OneLayer(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)


def adapted(config, dtype=torch.float32):
    return get_peft_model(OneLayer(dtype), config).base_model.model.layer.train()


def ours(N=3, share="B", dropout=0.0, dtype=torch.float32, r=R, **settings):
    config = MultiLoraConfig(
        share=share, num_experts=N, r=r, lora_dropout=dropout, target_modules=["layer"], **settings
    )
    return adapted(config, dtype)


def pefts_lora(dropout=0.0, dtype=torch.float32):
    return adapted(LoraConfig(r=R, lora_dropout=dropout, target_modules=["layer"]), dtype)


def adapter_units(layer, dtype=torch.float32):
    """Units of the adapted layer less those of its frozen base layer."""
    x = torch.randn(T, WIDTH, dtype=dtype, requires_grad=True)
    upstream = torch.randn(T, WIDTH, dtype=dtype)
    base = traffic(layer.base_layer, x, upstream)
    x.grad = None  # or the second backward would add to it
    return traffic(layer, x, upstream) - base


def test_the_account_agrees_with_counts_made_by_hand():
    # Forward: x, x → dropout-free A; B's result written, scaled (2), added (3). Backward: scaled (2), dy read twice,
    # x once, dx written, and added to the base layer's (3).
    assert adapter_units(pefts_lora()) == pytest.approx(16.0)

    layer = ours(N=3, init_weights=False)
    W0 = layer.base_layer.weight
    A, router, B = (getattr(layer, f"braidlora_{n}")["default"].weight for n in ("A", "router", "B"))

    def loop(x):
        return expert_loop(x, W0, None, A, router, B, share="B", N=3, scaling=2.0)

    x = torch.randn(T, WIDTH, requires_grad=True)
    upstream = torch.randn(T, WIDTH)
    assert traffic(loop, x, upstream) > 50.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", SHARES)
def test_traffic_is_at_most_10_units_and_does_not_grow_with_experts(share, dtype):
    units = [adapter_units(ours(N, share, dtype=dtype), dtype) for N in (2, 3, 8)]
    assert units[0] == units[1] == units[2]
    assert units[0] <= 10.0


def test_three_dimensional_input_with_bias_costs_no_more():
    """A base layer with bias returns a view for 3-D input, where an in-place update could cost a copy."""
    layer = ours(3)
    layer.base_layer.bias = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)
    x = torch.randn(4, T // 4, WIDTH, requires_grad=True)
    upstream = torch.randn(4, T // 4, WIDTH)

    def units(module):
        from accounting import FullWidthTraffic

        x.grad = None
        with FullWidthTraffic(T, WIDTH, 4) as account:
            module(x).backward(upstream)
        return account.units

    assert units(layer) - units(layer.base_layer) <= 10.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", SHARES)
def test_traffic_with_dropout_is_not_above_pefts_lora(share, dtype):
    theirs = adapter_units(pefts_lora(0.1, dtype), dtype)
    units = [adapter_units(ours(N, share, 0.1, dtype), dtype) for N in (2, 3, 8)]
    assert units[0] == units[1] == units[2]
    assert units[0] <= theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "r"), [(1, 8), (2, 1), (2, 4), (2, 8), (3, 4), (3, 8), (8, 8), (8, 16)])
@pytest.mark.parametrize("share", SHARES)
def test_saved_activations(share, N, r, dtype):
    layer = ours(N, share, r=r, dtype=dtype, init_weights=False)
    x = torch.randn(T, WIDTH, dtype=dtype, requires_grad=True)
    kept, _ = saved_for_backward(layer, x)
    # Copies of weights exist only where they had to be cast, and are no larger than the cast weights.
    activations = [tensor for tensor in kept if tensor.shape[0] == T]
    copies = [tensor for tensor in kept if tensor.shape[0] != T]
    budget = T * (N * r + 2 * N + r) * x.element_size()
    assert sum(tensor.untyped_storage().nbytes() for tensor in activations) <= budget
    assert (len(copies) > 0) == (dtype == torch.bfloat16)
    assert all(tensor.dtype == dtype and WIDTH in tensor.shape for tensor in copies)


def test_dropout_keeps_a_mask_of_bytes_and_no_copy_of_x():
    layer = ours(3, dropout=0.1)
    x = torch.randn(T, WIDTH, requires_grad=True)
    kept, _ = saved_for_backward(layer, x)
    wide = [tensor for tensor in kept if tensor.numel() == x.numel()]
    assert [tensor.dtype for tensor in wide] == [torch.bool]


def test_without_gradients_nothing_is_saved():
    layer = ours(3)
    with torch.no_grad():
        kept, y = saved_for_backward(layer, torch.randn(T, WIDTH))
    assert kept == []
    assert y.grad_fn is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("share", SHARES)
def test_compiles_to_one_graph(share, dropout):
    layer = ours(3, share, dropout, init_weights=False)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, WIDTH, requires_grad=True)
    layer.train(dropout > 0)
    y = compiled(x)
    y.square().mean().backward()
    assert torch.isfinite(x.grad).all()
    if dropout == 0.0:
        got = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]
        layer.zero_grad()
        x.grad = None
        eager = layer(x)
        eager.square().mean().backward()
        torch.testing.assert_close(y, eager)
        wanted = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
