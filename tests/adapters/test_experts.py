"""Adapters on stacked experts: the mathematics, beside a float64 reference, PEFT's LoRA and the base's own classes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from moe_models import (
    EXPERTS,
    IDS,
    MODELS,
    AnySettings,
    adapt,
    adapter_blocks,
    config,
    experts_of,
    logits,
    mixtral,
    parts,
    reference_experts,
)
from torch import nn

from braidlora.adapters import MultiLoraExperts, MultiLoraParameter, stacked_parameters, with_balance_loss
from braidlora.adapters._experts import Rows

SHARES = ["B", "A", "none"]


def rows_of(experts):
    return Rows(torch.tensor(experts), torch.arange(len(experts)), 4, "eager")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_equals_one_token_at_a_time_in_float64(kind, share, implementation):
    """Result, and the gradients of everything: x, routing weights, A's, router, B's, biases."""
    model = adapt(MODELS[kind](implementation=implementation).double(), share=share, num_experts=3).double()
    layer = experts_of(model.base_model.model)
    assert isinstance(layer, MultiLoraExperts)
    base = layer.base_layer
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    torch.manual_seed(2)
    x = (3 * torch.randn(7, 32, dtype=torch.float64)).requires_grad_()
    index = torch.stack([torch.randperm(base.num_experts)[:2] for _ in range(7)])
    index[index == 1] = 0  # an expert without rows; a token may then meet one twice, which is legal too
    routing = torch.rand(7, 2, dtype=torch.float64).requires_grad_()
    weights = dict(base.named_parameters())
    adapters = {name: adapter_blocks(part) for name, part in layer.adapted().items()}
    assert set(adapters) == {"gate_up_proj", "down_proj"}
    expected = reference_experts(kind, weights, adapters, x, index, routing)
    given = layer(x, index, routing)
    assert torch.allclose(given, expected, rtol=1e-12, atol=1e-12)

    wrt = [x, routing, *(p for p in layer.parameters())]
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(given, wrt, upstream, allow_unused=True),
        torch.autograd.grad(expected, wrt, upstream, allow_unused=True),
        strict=True,
    ):
        assert one is not None
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_agree_with_the_loop(kind, dtype):
    """transformers' default implementation; odd ranks, so that rows are no multiple of 16 bytes."""
    results = []
    for implementation in ("eager", "grouped_mm"):
        model = adapt(MODELS[kind](implementation=implementation).to(dtype), r=3)
        layer = experts_of(model.base_model.model)
        torch.manual_seed(2)
        x = torch.randn(9, 32, dtype=dtype).requires_grad_()
        index, routing = torch.randint(4, (9, 2)), torch.rand(9, 2, dtype=dtype)
        y = layer(x, index, routing)
        wrt = [x, *(p for p in layer.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y, wrt, torch.randn_like(y))])
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= tolerance * (1 + other.abs().max())


@pytest.mark.parametrize("kind", MODELS)
def test_one_expert_is_pefts_lora(kind):
    """N = 1 and copied factors: logits and gradients of PEFT's LoRA with target_parameters."""
    ours = adapt(MODELS[kind]().double(), num_experts=1).double()
    theirs = peft.get_peft_model(
        MODELS[kind]().double(),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS),
    ).double()
    pairs = []
    for name, layer in ours.named_modules():
        if isinstance(layer, MultiLoraParameter):
            wrapper = theirs.get_submodule(name.rpartition(".")[0])
            while wrapper.parameter_name != layer.parameter_name:
                wrapper = wrapper.base_layer
        elif hasattr(layer, "braidlora_A"):
            wrapper = theirs.get_submodule(name)
        else:
            continue
        E = getattr(layer, "blocks", 1)
        A, B = layer.braidlora_A["default"].weight, layer.braidlora_B["default"].weight
        wrapper.lora_A["default"].weight.data = A.detach().clone()
        # PEFT has the expert as the inner index of B's columns.
        wrapper.lora_B["default"].weight.data = (
            B.detach().view(len(B), E, -1).transpose(1, 2).reshape(len(B), -1).clone()
        )
        pairs.append((A, B, E, wrapper))
    assert len(pairs) == 8
    results = [model(input_ids=IDS).logits for model in (ours, theirs)]
    assert (results[0] - results[1]).abs().max() < 1e-12 * results[1].abs().max()
    for result in results:
        result.square().sum().backward()
    for A, B, E, wrapper in pairs:
        grad_B = wrapper.lora_B["default"].weight.grad.view(len(B), -1, E).transpose(1, 2).reshape(len(B), -1)
        assert torch.allclose(A.grad, wrapper.lora_A["default"].weight.grad, rtol=1e-9, atol=1e-9)
        assert torch.allclose(B.grad, grad_B, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_zero_init_changes_no_bit(kind, implementation):
    base = MODELS[kind](implementation=implementation)
    before = logits(base)
    assert torch.equal(logits(adapt(base, init_weights=True)), before)


def _same_with_and_without(cls):
    """With B = 0 the base's results in every implementation; with B drawn, the same change in all of them."""
    changes = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        torch.manual_seed(0)
        experts = cls(AnySettings(implementation))
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        names = [f"experts.{name}" for name in stacked_parameters(experts)]
        assert len(names) == 2
        up = getattr(experts, names[0].rpartition(".")[2])
        x = torch.randn(9, up.shape[1 if experts.is_transposed else 2])
        index, routing = torch.randint(4, (9, 2)), torch.rand(9, 2)
        before = experts(x, index, routing)
        settings = {
            "target_modules": None,
            "target_parameters": names,
            "task_type": None,
            "init_weights": True,
        }
        adapted = peft.get_peft_model(nn.ModuleDict({"experts": experts}), config(**settings))
        layer = adapted.base_model.model["experts"]
        assert torch.allclose(
            layer(x, index, routing), before, atol=1e-5 * float(before.detach().abs().max())
        )
        for part in parts(adapted).values():
            nn.init.normal_(part.braidlora_B["default"].weight, std=0.1)
        changes.append(layer(x, index, routing) - before)
    assert changes[0].abs().max() > 1e-2
    for change in changes[1:]:
        assert torch.allclose(change, changes[0], atol=1e-4 * float(changes[0].detach().abs().max()))


_M = transformers.models


@pytest.mark.parametrize(
    "cls",
    [
        _M.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts,
        _M.nemotron_h.modeling_nemotron_h.NemotronHExperts,  # no gate
        _M.aria.modeling_aria.AriaExperts,  # transposed, without biases
    ],
)
def test_other_classes_of_transformers_interface(cls):
    _same_with_and_without(cls)


@pytest.mark.slow
def test_every_class_of_transformers_interface():
    count = 0
    for path in sorted(Path(transformers.__path__[0]).glob("models/*/modeling_*.py")):
        for name in re.findall(
            r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE
        ):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            _same_with_and_without(getattr(module, name))
            count += 1
    assert count >= 50


def test_dropout_keeps_the_mean():
    model = adapt(mixtral(), lora_dropout=0.3, target_modules=[], target_parameters=["experts.down_proj"])
    part = experts_of(model.base_model.model).down_proj.train()
    x, rows = torch.randn(6, 24), rows_of([0, 0, 1, 2, 2, 3])
    with torch.no_grad():
        mean = torch.stack([part(x, rows) for _ in range(4000)]).mean(0)
        part.eval()
        exact = part(x, rows)
    assert (mean - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 22),
    reason="transformers up to 5.21 cannot compile its own grouped products on a CPU",
)
def test_torch_compile():
    model = adapt(mixtral(implementation="grouped_mm"))
    layer = experts_of(model.base_model.model)
    inputs = (torch.randn(5, 32), torch.randint(4, (5, 2)), torch.rand(5, 2))
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(whole(*inputs), layer(*inputs), atol=1e-5)


def test_balance_loss_evens_out_the_routers():
    """Each base expert's router is pulled towards even use, with the strength of one linear layer's in all."""
    base = mixtral()
    model = adapt(base, target_modules=[], target_parameters=["experts.down_proj"], balance_loss=0.5).train()
    part = experts_of(model.base_model.model).down_proj
    rows = rows_of([0, 0, 0, 2, 2])
    x = torch.randn(5, 24)
    router = part.braidlora_router["default"].weight
    (grad,) = torch.autograd.grad(with_balance_loss(model, part(x, rows).sum() * 0.0), router)
    w = part.routing(x, rows, "default")
    mean = [w[:3].mean(0), w[3:].mean(0)]
    loss = sum(share * (3 * p.square().sum() - 1) for share, p in zip((0.6, 0.4), mean, strict=True))
    (expected,) = torch.autograd.grad(0.5 * loss, router)
    assert torch.allclose(grad, expected, atol=1e-6)
    assert expected.any()
