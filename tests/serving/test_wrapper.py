"""The plugin's parts that need no vLLM: the gated wrapper around kernels of our own, and the check of seams."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from braidlora.serving.adapter_file import Layout
from braidlora.serving.gate import GateTables
from braidlora.serving.vllm import TESTED, seams, wrapper

RANK = 16


class Kernels:
    """What vLLM's punica wrapper for CPUs does, one token after the other."""

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
        slots = {name: slot for slot, name in enumerate(lora_index_to_id)}
        self.token_lora_indices = torch.tensor([slots.get(name, -1) for name in mapping.index_mapping])

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
        assert not kwargs
        for buffer, a in zip(y, lora_a_stacked, strict=True):
            for t, slot in enumerate(self.token_lora_indices):
                buffer[t] = scale * (a[slot, 0] @ x[t])  # -1 is the last slot, as in vLLM

    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs):
        assert not kwargs
        for buffer, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            for t, slot in enumerate(self.token_lora_indices):
                y[t, offset_start : offset_start + size] += b[slot, 0] @ buffer[t]
            offset_start += size

    def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs):
        buffer = tuple(torch.zeros(x.shape[0], RANK) for _ in output_slices)
        self.add_shrink(buffer, x, lora_a_stacked, scale, **kwargs)
        self.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=True, **kwargs)

    def add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs):
        chosen = lora_a_stacked[self.sampler_indices, 0]
        y += torch.einsum(
            "bo,bvo->bv", torch.einsum("bi,boi->bo", x, chosen), lora_b_stacked[self.sampler_indices, 0]
        )


@pytest.fixture
def gated():
    """A gated wrapper with a plain LoRA (id 7), ALoRA-like experts (8) and nothing in the last slot but weights."""
    made = Kernels()
    made.__class__ = wrapper.with_gate(Kernels)
    made.gate, made.on_cpu = GateTables(3, RANK, 32, "cpu"), True
    made.gate.set_slot(1, Layout(2, 3))
    return made


def batch(made, *tokens):
    made.update_metadata(SimpleNamespace(index_mapping=tokens), [7, 8, 9], 3, 64)


def test_prompt_logprobs_of_two_requests_do_not_end_the_engine(gated):
    gated.sampler_indices = torch.tensor([0, 1])  # one token of each request
    prompt, last = torch.randn(7, 5), torch.randn(2, 5)
    a, none = torch.randn(3, 1, RANK, 5), torch.zeros(3, 1, 6, RANK)
    with pytest.raises(RuntimeError, match="broadcast"):
        Kernels.add_lora_logits(gated, torch.zeros(7, 6), prompt, a, none, 1.0)
    logits = torch.ones(7, 6)
    assert gated.add_lora_logits(logits, prompt, a, none, 1.0) is None
    assert torch.equal(logits, torch.ones(7, 6))

    b, logits = torch.randn(3, 1, 6, RANK), torch.zeros(2, 6)
    gated.add_lora_logits(logits, last, a, b, 1.0)
    assert logits.any(), "an adapter of the output layer still acts where the indices fit"


def test_a_mixed_batch(gated):
    torch.manual_seed(0)
    a, b = torch.randn(3, 1, RANK, 5), torch.randn(3, 1, 6, RANK)
    tokens = (0, 7, 8, 8, 0)
    batch(gated, *tokens)
    x, y = torch.randn(5, 5), torch.zeros(5, 6)
    gated.add_lora_linear(y, x, (a,), (b,), 1.0, (6,))
    for t, name in enumerate(tokens):
        expected = torch.zeros(6)
        if name:
            hidden = a[name - 7, 0] @ x[t]
            if name == 8:
                weights = torch.softmax(hidden[-2:], 0).repeat_interleave(3)
                hidden = torch.cat([hidden[:6] * weights, torch.zeros(RANK - 6)])
            expected = b[name - 7, 0] @ hidden
        torch.testing.assert_close(y[t], expected, rtol=1e-5, atol=1e-5)


def test_the_base_is_left_alone_even_without_a_router(gated):
    gated.gate.set_slot(1, None)
    batch(gated, 0, 7)
    y = torch.zeros(2, 6)
    gated.add_lora_linear(
        y, torch.randn(2, 5), (torch.randn(3, 1, RANK, 5),), (torch.randn(3, 1, 6, RANK),), 1.0, (6,)
    )
    assert not y[0].any()
    assert y[1].any()


def test_a_row_parallel_layer_sums_the_logits_of_its_workers(gated, monkeypatch):
    """Two workers with half of x each, one after the other: what they add up to is what one worker gives."""
    torch.manual_seed(0)
    a, b, x = torch.randn(3, 1, RANK, 8), torch.randn(3, 1, 6, RANK), torch.randn(3, 8)
    batch(gated, 8, 7, 8)
    whole = torch.zeros(3, 6)
    gated.add_lora_linear(whole, x, (a,), (b,), 1.0, (6,))
    logits = torch.stack([a[max(slot, 0), 0] @ x[t] for t, slot in enumerate([1, 0, 1])])[
        None, :, RANK - gated.gate.logits :
    ]
    calls = []
    monkeypatch.setattr(wrapper, "_all_reduce", lambda part: calls.append(part.shape) or logits)
    divided = torch.zeros(3, 6)
    for half in (slice(0, 4), slice(4, 8)):
        wrapper.Partial(gated).add_lora_linear(divided, x[:, half], (a[..., half],), (b,), 1.0, (6,))
    torch.testing.assert_close(divided, whole, rtol=1e-4, atol=1e-4)
    assert calls == [(1, 3, gated.gate.logits)] * 2
    assert wrapper.Partial(gated).token_lora_indices is gated.token_lora_indices


def test_a_batch_without_router_and_base_skips_the_gate_on_a_cpu(gated):
    for tokens, needed in (((7, 7), False), ((7, 8), True), ((0,), True)):
        batch(gated, *tokens)
        assert gated.is_needed is needed
    gated.on_cpu, gated.is_needed = False, True
    batch(gated, 7)
    assert gated.is_needed, "a captured graph has the gate whatever the batch is"


@pytest.fixture
def module(monkeypatch):
    found = ModuleType("some_vllm")
    monkeypatch.setitem(sys.modules, "some_vllm", found)
    return found


def test_a_seam_is_compared_by_its_parameters(module):
    seam = seams.Seam("some_vllm", "Thing.load", ("path", "device"), ("dtype", "**"))

    class Thing:
        def load(self, path, device, extra=None, *, dtype=None, **kwargs): ...

    module.Thing = Thing
    assert seam.problem() is None
    for wrong in (
        lambda self, path, dtype, **kwargs: None,
        lambda self, device, path, dtype=None, **kwargs: None,
        lambda self, path, device, dtype=None: None,
        lambda self, path, device, **kwargs: None,
    ):
        Thing.load = wrong
        assert "some_vllm.Thing.load takes (path" in seam.problem() or "takes (device" in seam.problem()
    del Thing.load
    assert "some_vllm.Thing.load is missing (AttributeError" in seam.problem()


def test_one_sentence_refuses_a_version():
    text = seams.refusal(["vllm.lora.x is missing", "vllm.lora.y takes (a)"])
    assert text.endswith(f"which was tested with {' and '.join(TESTED)}: vllm.lora.x is missing and 1 more.")
    assert text.count(". ") == 0
