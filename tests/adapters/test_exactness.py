"""The layer against a loop over experts and against PEFT's LoRA, in float64: outputs and every gradient."""

import math

import pytest
import torch
from expert_loop import expert_loop, experts
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from braidlora import MultiLoraConfig
from braidlora.adapters import _gate, functional, with_balance_loss

SHARES = ["B", "A", "none"]
COUNTS = [1, 2, 3, 8]
K, D, R = 12, 10, 4


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapted(share, N, *, bias=True, conv1d=False, dtype=torch.float64, r=R, d=D, k=K, **settings):
    """An adapted layer whose B is not zero, and (W0 (d, k), b)."""
    torch.manual_seed(7)
    base = Conv1D(d, k) if conv1d else nn.Linear(k, d, bias=bias)
    if conv1d:
        nn.init.normal_(base.bias)
    settings = {"lora_dropout": 0.0, "init_weights": False, **settings}
    config = MultiLoraConfig(share=share, num_experts=N, r=r, target_modules=["layer"], **settings)
    model = get_peft_model(OneLayer(base.to(dtype)), config)
    layer = model.base_model.model.layer
    W0 = base.weight.detach().T if conv1d else base.weight.detach()
    return layer, W0, None if base.bias is None else base.bias.detach()


def weights(layer):
    names = ["A", "router", "B"]
    modules = [getattr(layer, f"braidlora_{name}") for name in names]
    return [module["default"].weight if "default" in module else None for module in modules]


def gradients(y, inputs, upstream):
    wanted = [tensor for tensor in inputs if tensor is not None]
    return torch.autograd.grad(y, wanted, upstream)


def assert_equal_to_loop(layer, W0, bias, x, share, N, atol=1e-10, **options):
    x = x.clone().requires_grad_()
    A, Wg, B = weights(layer)
    expected = expert_loop(
        x, W0, bias, A, Wg, B, share=share, N=N, scaling=layer.scaling["default"], **options
    )
    actual = layer(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)
    upstream = torch.randn_like(expected)
    for ours, reference in zip(
        gradients(actual, [x, A, Wg, B], upstream), gradients(expected, [x, A, Wg, B], upstream), strict=True
    ):
        torch.testing.assert_close(ours, reference, atol=atol, rtol=0)


@pytest.mark.parametrize("how", ["fused", "padded", "plain"])
@pytest.mark.parametrize("N", COUNTS)
@pytest.mark.parametrize("share", SHARES)
def test_forward_and_all_gradients_equal_the_loop(share, N, how, monkeypatch):
    layer, W0, bias = adapted(share, N, router_temperature=1.7)
    if how == "plain":  # what torch.compile and FSDP go through
        monkeypatch.setattr(layer, "_readable_weights", lambda x, names: None)
    if how == "padded":  # as inputs of many elements are
        monkeypatch.setattr(_gate, "_MANY", 0)
    assert_equal_to_loop(layer, W0, bias, torch.randn(5, 7, K).double(), share, N, temperature=1.7)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("base", ["bias", "no bias", "Conv1D"])
def test_every_kind_of_base_layer_and_input(share, shape, base):
    layer, W0, bias = adapted(share, 3, bias=base != "no bias", conv1d=base == "Conv1D")
    assert_equal_to_loop(layer, W0, bias, torch.randn(*shape, K).double(), share, 3)


def test_input_that_is_not_contiguous():
    layer, W0, bias = adapted("B", 3)
    assert_equal_to_loop(layer, W0, bias, torch.randn(K, 5, 6).double().permute(1, 2, 0), "B", 3)


def test_no_tokens_at_all():
    layer, *_ = adapted("B", 3, balance_loss=0.1)
    y = layer(torch.zeros(0, K).double().requires_grad_())
    with_balance_loss(layer, y.sum()).backward()
    assert y.shape == (0, D)
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in weights(layer))


def test_gradcheck():
    layer, *_ = adapted("none", 2)
    x = torch.randn(3, K).double().requires_grad_()
    A, Wg, B = weights(layer)
    assert torch.autograd.gradcheck(lambda x, A, Wg, B: layer(x), (x, A, Wg, B))


def test_first_layer_whose_input_needs_no_gradient():
    layer, W0, bias = adapted("B", 3)
    x = torch.randn(5, K).double()
    A, Wg, B = weights(layer)
    expected = expert_loop(x, W0, bias, A, Wg, B, share="B", N=3, scaling=layer.scaling["default"])
    upstream = torch.randn_like(expected)
    for ours, reference in zip(
        gradients(layer(x), [A, Wg, B], upstream), gradients(expected, [A, Wg, B], upstream), strict=True
    ):
        torch.testing.assert_close(ours, reference, atol=1e-10, rtol=0)


@pytest.mark.parametrize("frozen", ["A", "router", "B"])
def test_a_frozen_factor_gets_no_gradient_and_changes_no_other(frozen):
    layer, *_ = adapted("B", 3)
    x = torch.randn(5, K).double()
    layer(x).square().sum().backward()
    before = [w.grad.clone() for w in weights(layer)]
    layer.zero_grad()
    getattr(layer, f"braidlora_{frozen}")["default"].requires_grad_(False)
    layer(x).square().sum().backward()
    for name, weight, gradient in zip(["A", "router", "B"], weights(layer), before, strict=True):
        assert weight.grad is None if name == frozen else torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("N", [1, 3])
def test_shared_dropout_mask(share, N, plain, monkeypatch):
    layer, W0, bias = adapted(share, N, lora_dropout=0.4)
    if plain:
        monkeypatch.setattr(layer, "_readable_weights", lambda x, names: None)
    mask = (torch.rand(6, K) > 0.4).double() / 0.6
    monkeypatch.setattr(torch, "native_dropout", lambda x, p, train: (x * mask, mask != 0))
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p: x * mask)
    assert_equal_to_loop(layer, W0, bias, torch.randn(6, K).double(), share, N, masks=[mask])


@pytest.mark.parametrize("share", ["B", "none"])
def test_one_dropout_mask_per_expert(share, monkeypatch):
    layer, W0, bias = adapted(share, 3, lora_dropout=0.4, dropout_mask="per_expert")
    masks = [(torch.rand(6, K) > 0.4).double() / 0.6 for _ in range(3)]
    queue = iter(masks)
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p: x * next(queue))
    assert_equal_to_loop(layer, W0, bias, torch.randn(6, K).double(), share, 3, masks=masks)


@pytest.mark.parametrize("mask", ["shared", "per_expert"])
def test_dropout_drops_and_rescales_in_training_only(mask):
    layer, *_ = adapted("B", 3, lora_dropout=0.5, dropout_mask=mask)
    x = torch.randn(4, K).double()
    layer.train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(mean, layer(x), atol=0.15, rtol=0)


@pytest.mark.parametrize("conv1d", [False, True])
def test_one_expert_is_pefts_lora(conv1d):
    ours, W0, bias = adapted("B", 1, conv1d=conv1d, bias=True)
    base = Conv1D(D, K) if conv1d else nn.Linear(K, D)
    base.weight.data, base.bias.data = (W0.T if conv1d else W0).clone(), bias.clone()
    lora = get_peft_model(
        OneLayer(base.double()),
        LoraConfig(r=R, lora_alpha=16, target_modules=["layer"], fan_in_fan_out=conv1d),
    ).base_model.model.layer
    A, _, B = weights(ours)
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = A.data, B.data
    x = torch.randn(3, 5, K).double().requires_grad_()
    mine, theirs = ours(x), lora(x)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    upstream = torch.randn_like(mine)
    reference = gradients(theirs, [x, lora.lora_A["default"].weight, lora.lora_B["default"].weight], upstream)
    for a, b in zip(gradients(mine, [x, A, B], upstream), reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert "default" not in ours.braidlora_router


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("N", COUNTS)
def test_a_new_adapter_changes_nothing(share, N):
    layer, *_ = adapted(share, N, init_weights=True, dtype=torch.float32, lora_dropout=0.3)
    x = torch.randn(5, K)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_every_a_is_drawn_independently():
    """Pairwise overlap of the row spaces, mean over layers: r / k is chance, 1 the same draw."""
    overlaps, r, k = [], 8, 256
    for seed in range(6):
        torch.manual_seed(seed)
        layer, *_ = adapted("none", 4, r=r, k=k, d=8, dtype=torch.float32)
        A = weights(layer)[0].detach()
        assert A.abs().max() <= 1 / math.sqrt(k)
        assert A.std().item() == pytest.approx(1 / math.sqrt(3 * k), rel=0.05)
        bases = [torch.linalg.qr(Ai.T).Q for Ai, _ in experts(A, weights(layer)[2], "none", 4)]
        overlaps += [(bases[i].T @ bases[j]).square().sum() / r for i in range(4) for j in range(i)]
    assert torch.stack(overlaps).mean().item() == pytest.approx(r / k, rel=0.15)
    assert max(overlaps) < 3 * r / k


@pytest.mark.parametrize("share", SHARES)
def test_bf16_base_with_float32_adapter(share):
    layer, W0, bias = adapted(share, 3, dtype=torch.bfloat16, k=64)
    assert all(w.dtype == torch.float32 for w in weights(layer))
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    A, Wg, B = weights(layer)
    exact = [t.detach().double().requires_grad_() for t in (x, A, Wg, B)]
    expected = expert_loop(
        exact[0], W0.double(), bias.double(), *exact[1:], share=share, N=3, scaling=layer.scaling["default"]
    )
    expected.square().mean().backward()
    assert_near(y, expected)
    for ours, reference in zip((x, A, Wg, B), exact, strict=True):
        assert_near(ours.grad, reference.grad)


def assert_near(ours, exact, tolerance=0.02):
    """Relative error in the Frobenius norm: bfloat16 has eight bits."""
    assert ((ours.detach().double() - exact).norm() / exact.norm()).item() < tolerance


def test_softmax_is_float32_under_16_bit():
    assert functional.gate_weights(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert functional.gate_weights(torch.zeros(2, 3, dtype=torch.float16), 0.5).dtype == torch.float32
    assert functional.gate_weights(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_autocast_takes_part_in_the_lower_precision():
    layer, W0, bias = adapted("B", 3, dtype=torch.float32, k=64)
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    x64 = x.detach().double().requires_grad_()
    expected = expert_loop(
        x64, W0.double(), bias.double(), *(w.detach().double() for w in weights(layer)),
        share="B", N=3, scaling=layer.scaling["default"],
    )  # fmt: skip
    expected.square().mean().backward()
    assert_near(y, expected)
    assert_near(x.grad, x64.grad)


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("share", SHARES)
def test_balance_loss_is_added_to_the_gradients_only(share, plain, monkeypatch):
    layer, W0, bias = adapted(share, 3, balance_loss=0.3)
    if plain:
        monkeypatch.setattr(layer, "_readable_weights", lambda x, names: None)
    x = torch.randn(2, 5, K).double().requires_grad_()
    A, Wg, B = weights(layer)
    expected = expert_loop(x, W0, bias, A, Wg, B, share=share, N=3, scaling=layer.scaling["default"])
    importance = torch.softmax(x @ Wg.T, -1).sum(
        (0, 1)
    )  # Shazeer et al.: the squared coefficient of variation
    loss = expected.square().mean() + 0.3 * importance.var(unbiased=False) / importance.mean().square()
    reference = torch.autograd.grad(loss, [x, A, Wg, B])
    actual = layer.train()(x)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    actual_loss = with_balance_loss(layer, actual.square().mean())
    for a, b in zip(torch.autograd.grad(actual_loss, [x, A, Wg, B]), reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    without = torch.autograd.grad(layer.eval()(x).square().mean(), [Wg])[0]
    assert not torch.allclose(without, reference[2])


def test_balance_loss_range():
    w = torch.full((10, 4), 0.25)
    assert functional.balance_loss(w).item() == pytest.approx(0.0)
    assert functional.balance_loss(torch.eye(4)[:1].expand(10, 4)).item() == pytest.approx(3.0)


def test_balance_loss_evens_out_the_experts():
    layer, *_ = adapted("B", 3, balance_loss=1.0, dtype=torch.float32)
    router = weights(layer)[1]
    x = torch.randn(256, K) + 1.0
    router.data += torch.tensor([[0.3], [0.0], [-0.3]])
    before = functional.balance_loss(torch.softmax(x @ router.T, -1)).item()
    optimizer = torch.optim.SGD([router], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        with_balance_loss(layer, (layer(x) * 0.0).sum()).backward()
        optimizer.step()
    assert functional.balance_loss(torch.softmax(x @ router.T, -1)).item() < 0.1 * before


def test_two_active_adapters_add_up():
    layer, W0, bias = adapted("B", 3)
    second = MultiLoraConfig(share="A", num_experts=2, r=2, lora_dropout=0.0, init_weights=False)
    layer.update_layer("second", second, 2, 16.0)
    layer.double()
    layer.set_adapter(["default", "second"])
    x = torch.randn(5, K).double().requires_grad_()
    A, Wg, B = weights(layer)
    second = [getattr(layer, f"braidlora_{name}")["second"].weight for name in ("A", "router", "B")]
    expected = expert_loop(x, W0, bias, A, Wg, B, share="B", N=3, scaling=4.0)
    expected = expert_loop(x, torch.zeros_like(W0), None, *second, share="A", N=2, scaling=8.0) + expected
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)
    upstream = torch.randn_like(expected)
    inputs = [x, A, Wg, B, *second]
    for a, b in zip(
        gradients(layer(x), inputs, upstream), gradients(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_hooks_on_the_base_layer_see_its_own_result():
    """The fast path writes over y0 and adds to dx; it must not where a hook may have kept them."""
    layer, *_ = adapted("B", 3)
    seen = {}
    layer.base_layer.register_forward_hook(lambda m, i, o: seen.update(y0=o))
    layer.base_layer.register_full_backward_hook(lambda m, gi, go: seen.update(dx=gi[0]))
    x = torch.randn(5, K).double().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(seen["y0"], layer.base_layer(x), atol=0, rtol=0)
    torch.testing.assert_close(seen["dx"], torch.ones(5, D).double() @ layer.base_layer.weight)
    assert not torch.equal(seen["dx"], x.grad)
