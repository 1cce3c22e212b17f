"""The gate of a batch in which every token has another adapter, or none."""

import pytest
import torch

from braidlora.serving.adapter_file import Layout
from braidlora.serving.gate import GateTables

RANK = 32


def factors(buffer_R, layout):
    """What each column is multiplied by, one column after the other, in float64."""
    if layout is None:
        return torch.ones(RANK).double()
    n, r = layout.num_experts, layout.r
    weights = torch.softmax(buffer_R[RANK - n :].double(), -1)
    return torch.stack([weights[c // r] if c < n * r else torch.tensor(0.0).double() for c in range(RANK)])


@pytest.fixture
def tables():
    tables = GateTables(slots=4, rank=RANK, tokens=16, device="cpu")
    tables.set_slot(0, Layout(3, 8))
    tables.set_slot(1, None)
    tables.set_slot(2, Layout(5, 4))
    tables.set_slot(3, Layout(1, 8))
    return tables


def test_a_mixed_batch(tables):
    layouts = [Layout(3, 8), None, Layout(5, 4), None]
    slots = torch.tensor([0, 2, 1, -1, 3, 0, 2])
    buffer = torch.randn(3, 7, RANK)
    before = buffer.clone()
    tables.set_batch(slots)
    result = tables.apply(buffer)
    assert torch.equal(buffer, before), "the buffer must not change in place"
    for s in range(3):
        for t, slot in enumerate(slots.tolist()):
            expected = torch.zeros(RANK).double() if slot < 0 else factors(buffer[s, t], layouts[slot])
            torch.testing.assert_close(result[s, t].double(), expected * buffer[s, t], rtol=1e-5, atol=1e-6)


def test_the_base_is_never_changed_by_the_last_slot(tables):
    tables.set_batch(torch.tensor([-1, -1]))
    assert not tables.apply(torch.randn(1, 2, RANK)).any()


def test_a_plain_lora_passes_unchanged_even_with_values_that_overflow(tables):
    tables.set_batch(torch.tensor([1, 3]))
    buffer = torch.randn(1, 2, RANK)
    buffer[0, 0, -1] = 3e38
    assert torch.equal(tables.apply(buffer), buffer)


def test_a_slot_is_reused_by_an_adapter_of_another_kind(tables):
    buffer = torch.randn(1, 1, RANK)
    for layout in (Layout(2, 4), Layout(10, 2), None, Layout(3, 8), Layout(16, 1)):
        tables.set_slot(0, layout)
        tables.set_batch(torch.tensor([0]))
        expected = factors(buffer[0, 0], layout) * buffer[0, 0]
        torch.testing.assert_close(tables.apply(buffer)[0, 0].double(), expected, rtol=1e-5, atol=1e-6)
        assert (0 in tables.routed) == (layout is not None)


def test_only_logits_are_summed_over_workers(tables):
    """Two workers with half of x each; what they expand adds up to what one worker expands."""
    tables.set_batch(torch.tensor([0, 1, 2]))
    parts = torch.randn(2, 1, 3, RANK)
    seen = []

    def reduce(logits):
        seen.append(logits.shape)
        return parts.sum(0)[..., RANK - tables.logits :]

    whole = tables.apply(parts.sum(0))
    divided = tables.apply(parts[0], reduce) + tables.apply(parts[1], reduce)
    torch.testing.assert_close(divided, whole)
    assert seen == [(1, 3, tables.logits)] * 2


def test_batch_tensors_stay_where_they_are(tables):
    """CUDA graphs read the addresses that they were captured with; also with padding beyond the batch."""
    before = tables.column_TR.data_ptr(), tables.mask_TM.data_ptr()
    for size in (16, 3, 8):
        tables.set_batch(torch.zeros(size, dtype=torch.long))
        assert tables.apply(torch.randn(1, 16, RANK)).isfinite().all()
    assert before == (tables.column_TR.data_ptr(), tables.mask_TM.data_ptr())


def test_no_control_flow_depends_on_data(tables):
    """The gate traces into one graph, which gives the same on another batch."""

    def gated(buffer, columns, mask):
        tables.column_TR, tables.mask_TM = columns, mask
        return tables.apply(buffer)

    tables.set_batch(torch.tensor([0, 1, 2, -1]))
    traced = torch.fx.experimental.proxy_tensor.make_fx(gated)(
        torch.randn(1, 4, RANK), tables.column_TR.clone(), tables.mask_TM.clone()
    )
    tables.column_TR, tables.mask_TM = (torch.zeros_like(t) for t in (tables.column_TR, tables.mask_TM))
    tables.set_batch(torch.tensor([2, -1, 0, 0]))
    buffer = torch.randn(1, 4, RANK)
    columns, mask = tables.column_TR, tables.mask_TM
    torch.testing.assert_close(traced(buffer, columns, mask), tables.apply(buffer))
