"""The alignment loss against a loop over pairs and positions in float64; padding and grouping."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from braidlora.adapters.alignment import _LEAST_VARIANCE, _WIDTHS, alignment_loss, collecting

TASKS = torch.tensor([5, 0, 5, 2, 0, 5, 2])
LENGTHS = [4, 6, 2, 6, 3, 5, 1]


def parts(layers=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 6, 3, generator=generator, dtype=torch.float64) for _ in range(layers)]


def mask():
    return torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]


def mmd(P, Q):
    def k(X, Y):
        square = ((X[:, None] - Y[None]) ** 2).sum(-1)
        return sum(np.exp(-square / (2 * width)) for width in _WIDTHS).mean()

    return k(P, P) + k(Q, Q) - 2 * k(P, Q)


def kl(P, Q):
    m, n, v, u = P.mean(0), Q.mean(0), P.var(0) + _LEAST_VARIANCE, Q.var(0) + _LEAST_VARIANCE

    def one(m, v, n, u):
        return 0.5 * (np.log(u / v) + (v + (m - n) ** 2) / u - 1).sum()

    return 0.5 * (one(m, v, n, u) + one(n, u, m, v))


@pytest.mark.parametrize(("measure", "distance", "least"), [("mmd", mmd, 1), ("kl", kl, 2)])
def test_formula(measure, distance, least):
    layers, own = parts(), mask().numpy()
    wanted = []
    for part in layers:
        values = []
        for t, u in itertools.combinations(sorted(set(TASKS.tolist())), 2):
            for position in range(6):
                P, Q = (part.numpy()[(TASKS.numpy() == task) & own[:, position], position] for task in (t, u))
                if min(len(P), len(Q)) >= least:
                    values.append(distance(P, Q))
        wanted.append(np.mean(values))
    got = alignment_loss(layers, TASKS, mask(), measure)
    assert float(got) == pytest.approx(np.mean(wanted), abs=1e-10)
    assert len(_WIDTHS) == 19


@pytest.mark.parametrize("measure", ["mmd", "kl"])
def test_padding_and_order_of_rows_do_not_matter(measure):
    layers = parts()
    wanted = alignment_loss(layers, TASKS, mask(), measure)
    spoilt = [part.masked_fill(~mask()[..., None], 1e6) for part in layers]
    torch.testing.assert_close(alignment_loss(spoilt, TASKS, mask(), measure), wanted)
    wider = [torch.cat([part, torch.full((7, 3, 3), 9.0)], 1) for part in layers]
    padded = torch.cat([mask(), torch.zeros(7, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(alignment_loss(wider, TASKS, padded, measure), wanted)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = alignment_loss([part[order] for part in layers], TASKS[order], mask()[order], measure)
    torch.testing.assert_close(shuffled, wanted)


@pytest.mark.parametrize("measure", ["mmd", "kl"])
def test_equal_tasks_are_aligned_and_shifted_ones_are_not(measure):
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tasks, whole = torch.tensor([0] * 4 + [1] * 4), torch.ones(8, 5)
    same = alignment_loss([torch.cat([z, z])], tasks, whole, measure)
    assert float(same) == pytest.approx(0.0, abs=1e-12)
    near, far = (alignment_loss([torch.cat([z, z + shift])], tasks, whole, measure) for shift in (0.1, 1.0))
    assert 0 < near < far


def test_where_no_pair_has_rows_there_is_no_loss():
    whole = torch.ones(7, 6)
    assert alignment_loss(parts(), torch.zeros(7, dtype=torch.int64), whole) is None
    assert alignment_loss(parts(), torch.arange(7), whole, "kl") is None, "one row a task has no variance"
    assert alignment_loss([], TASKS, whole) is None
    assert alignment_loss([torch.randn(42, 3)], TASKS, whole) is None, "a layer that sees no rows"


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_every_share_collects_a_x_and_checkpoints_give_the_same_gradients(share):
    from peft import get_peft_model

    from braidlora import MultiLoraConfig

    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(12, 10)})
    base.forward = lambda x: base["layer"](x)
    config = MultiLoraConfig(
        share=share, r=3, target_modules=["layer"], alignment_loss=0.1, init_weights=False, num_experts=2
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    layer = model.base_model.model["layer"]
    x = torch.randn(7, 6, 12, dtype=torch.float64)

    def gradients(call):
        model.zero_grad()
        with collecting() as found:
            y = call(x)
        [h] = found
        torch.testing.assert_close(h, x @ layer.braidlora_A["default"].weight.T)
        (y.square().mean() + alignment_loss(found, TASKS, mask(), "kl")).backward()
        assert len(found) == 1, "what is run again is not collected again"
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    wanted = gradients(model)
    for one, other in zip(
        gradients(lambda x: checkpoint(layer, x, use_reentrant=False)), wanted, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    model.eval()
    with collecting() as found:
        model(x)
    assert found == [], "only in training"
